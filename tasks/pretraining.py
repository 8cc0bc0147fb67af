"""The pretraining corpora and every published mixture, as tables.

Tasks `<corpus>_{ul2,ul2_noprefix,full_lm}` and mixtures by their published names, each also with
`_reference` for the released pipeline's quirks. Source: the authors' T5 fork, t5/data/tasks.py and
mixtures.py; paper Table 1.

Rates are relative, and count training examples (chunks after denoising), neither tokens nor
documents: seqio mixes after preprocessing. In the fixed mode examples of one objective have the
same mean length in every corpus, so they are shares of tokens as well.

Only C4 has a validation split, so a mixture's `validation` is C4 alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import seqio

from openmoe.config import ConfigError
from openmoe.data.tfds_source import TfdsDocuments
from openmoe.data.vocabulary import UMT5_EXTRA_IDS, Vocabulary
from tasks import chains, locations

VOCABULARY = Vocabulary(locations.vocabulary_path, UMT5_EXTRA_IDS)

_TRAIN_ONLY = {'train': 'train'}
_WITH_HELD_OUT = {'train': 'train[:-2000]', 'validation': 'train[-2000:]'}
_BOOKS = (
  'RedPajama no longer publishes its books: give a copy of your own to scripts/build_datasets.sh, '
  'or leave the corpus out by name with tasks.pretraining.Without.'
)
_WIKIPEDIA = 'Prepare it with `tfds build wikipedia/20190301.en` in that directory.'

# Tokens of a pass as upstream counts them, with another tokenizer: enough for the plan of a run to
# estimate epochs. Source: data card of RedPajama.
_TOKENS = {
  'redpajama_common_crawl': 878e9, 'redpajama_c4': 175e9, 'redpajama_github': 59e9,
  'redpajama_arxiv': 28e9, 'redpajama_book': 26e9, 'redpajama_wikipedia': 24e9,
  'redpajama_stackexchange': 20e9,
}  # fmt: skip

# corpus: (TFDS name and version, splits, what to do when it is missing)
CORPORA: dict[str, tuple[str, Mapping[str, str], str]] = {
  'redpajama_c4': ('redpajama_c4:1.0.0', _WITH_HELD_OUT, ''),
  'redpajama_wikipedia': ('redpajama_wikipedia:1.0.0', _TRAIN_ONLY, ''),
  'redpajama_stackexchange': ('redpajama_stackexchange:1.0.0', _TRAIN_ONLY, ''),
  'redpajama_arxiv': ('redpajama_arxiv:1.0.0', _TRAIN_ONLY, ''),
  'redpajama_book': ('redpajama_book:1.0.0', _TRAIN_ONLY, _BOOKS),
  'redpajama_github': ('redpajama_github:1.0.0', _TRAIN_ONLY, ''),
  'redpajama_common_crawl': ('redpajama_common_crawl:1.0.0', _TRAIN_ONLY, ''),
  'the_stack_dedup': ('the_stack_dedup:1.0.0', _TRAIN_ONLY, ''),
  'wikipedia': ('wikipedia/20190301.en:1.0.0', _TRAIN_ONLY, _WIKIPEDIA),
}

# Versions I, II and III of the paper's Table 1, and the ablation without The Stack.
_VERSION_1 = {
  'redpajama_c4': 15, 'redpajama_wikipedia': 4.5, 'redpajama_stackexchange': 2.0,
  'redpajama_arxiv': 2.5, 'redpajama_book': 4.5, 'redpajama_github': 4.5,
  'redpajama_common_crawl': 67, 'the_stack_dedup': 100,
}  # fmt: skip
_LESS_CODE = {corpus: rate for corpus, rate in _VERSION_1.items() if corpus != 'the_stack_dedup'}
_STAGE_2 = {
  'redpajama_c4': 15, 'redpajama_wikipedia': 6.5, 'wikipedia': 6.5,
  'redpajama_stackexchange': 2.5, 'redpajama_arxiv': 4.5, 'redpajama_book': 6.5,
  'redpajama_github': 5.0, 'redpajama_common_crawl': 43.5, 'the_stack_dedup': 10,
}  # fmt: skip
_VERSION_3 = {
  'redpajama_c4': 15, 'redpajama_wikipedia': 4.5, 'wikipedia': 2.5,
  'redpajama_stackexchange': 1, 'redpajama_arxiv': 4.5, 'redpajama_book': 4.5,
  'redpajama_github': 5, 'redpajama_common_crawl': 33, 'the_stack_dedup': 30,
}  # fmt: skip

# mixture: (objective, rates)
MIXTURES: dict[str, tuple[str, Mapping[str, float]]] = {
  'mix_ul2': ('ul2', _VERSION_1),
  'mix_full_lm': ('full_lm', _VERSION_1),
  'mix_ul2_noprefix': ('ul2_noprefix', _VERSION_1),
  'mix_lesscode_ul2': ('ul2', _LESS_CODE),
  'mix_ul2_stage2': ('ul2', _STAGE_2),
  'mix_full_lm_stage2': ('full_lm', _STAGE_2),
  'mix_ul2_v2': ('ul2', _VERSION_3),
  'mix_full_lm_v2': ('full_lm', _VERSION_3),
}


def _task(corpus: str, objective: str, suffix: str) -> str:
  return f'{corpus}_{objective}{suffix}'


def _add_mixture(name: str, objective: str, rates: Mapping[str, float], suffix: str = '') -> None:
  # The released mix_ul2_noprefix lists the tasks with prefixes, so it is mix_ul2 under two names.
  if suffix and objective == 'ul2_noprefix':
    objective = 'ul2'
  seqio.MixtureRegistry.add(
    f'{name}{suffix}', [(_task(c, objective, suffix), float(r)) for c, r in rates.items()]
  )


for _corpus, (_name, _splits, _remedy) in CORPORA.items():
  chains.add_corpus(
    _corpus, TfdsDocuments(_name, _splits, _remedy, _TOKENS.get(_corpus)), VOCABULARY
  )
for _mixture, (_objective, _rates) in MIXTURES.items():
  for _suffix in ('', '_reference'):
    _add_mixture(_mixture, _objective, _rates, _suffix)


@dataclasses.dataclass(frozen=True)
class Without:
  """A published mixture without some corpora, asked for by name; the other rates renormalise.

  Attributes:
    mixture: a name of MIXTURES.
    corpora: corpora to leave out, such as ('redpajama_book',).
  """

  mixture: str
  corpora: Sequence[str]

  @property
  def name(self) -> str:
    return '_without_'.join([self.mixture, *self.corpora])

  def register(self) -> str:
    """Registers <mixture>_without_<corpus> and returns that name; again is a no-op.

    Raises:
      ConfigError: unknown mixture, or a corpus that is not part of it.
    """
    if self.mixture not in MIXTURES:
      raise ConfigError(f'mixture={self.mixture!r} is not one of {sorted(MIXTURES)}.')
    objective, rates = MIXTURES[self.mixture]
    unknown = set(self.corpora) - set(rates)
    if unknown or not self.corpora or len(self.corpora) >= len(rates):
      raise ConfigError(
        f'corpora={list(self.corpora)} must be some, not all, of {sorted(rates)} in {self.mixture}.'
      )
    if self.name not in seqio.MixtureRegistry.names():
      _add_mixture(self.name, objective, {c: r for c, r in rates.items() if c not in self.corpora})
    return self.name


@dataclasses.dataclass(frozen=True)
class MappedMixture:
  """A mixture over sources the user maps to data sets of their own.

  Attributes:
    name: of the mixture.
    rates: rate by source; a rate of 0 leaves the source out, unopened.
    tasks: the user's registered task by source.
  """

  name: str
  rates: Mapping[str, float]
  tasks: Mapping[str, str]

  def register(self) -> str:
    """Registers the mixture and returns its name.

    Raises:
      ConfigError: a source without a task, or a task that is not registered.
    """
    used = {source: rate for source, rate in self.rates.items() if rate}
    missing = sorted(set(used) - set(self.tasks))
    if missing:
      raise ConfigError(
        f'{self.name} has no task for {missing}: map every source to a registered task, or set '
        'its rate to 0.'
      )
    for source in used:
      if self.tasks[source] not in seqio.TaskRegistry.names():
        raise ConfigError(
          f'{self.name} maps {source} to {self.tasks[source]!r}, which is not registered.'
        )
    if self.name not in seqio.MixtureRegistry.names():
      seqio.MixtureRegistry.add(
        self.name, [(self.tasks[source], float(rate)) for source, rate in used.items()]
      )
    return self.name


# JetMoE's two phases in percent, read off the report's charts; rounded, both sum to 100. Its data
# sets are not TFDS data sets: map each with MappedMixture.
JETMOE_PHASE_1 = {
  'refinedweb': 64, 'starcoder': 25, 'pile': 8, 'arxiv': 1, 'openwebmath': 1, 'pes2o': 1,
}  # fmt: skip
JETMOE_PHASE_2 = {
  'refinedweb': 41, 'github': 20, 'wikipedia': 11, 'nl_sft': 7, 'math': 6, 'pile': 5,
  'textbook': 5, 'code_sft': 4, 'arxiv': 1,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class JetMoEPhase:
  """jetmoe_phase1 or jetmoe_phase2 over the user's tasks.

  Attributes:
    phase: 1 or 2.
    tasks: registered task by source, see JETMOE_PHASE_1 and JETMOE_PHASE_2.
  """

  phase: int
  tasks: Mapping[str, str]

  def register(self) -> str:
    """Registers the mixture; see MappedMixture.register."""
    if self.phase not in (1, 2):
      raise ConfigError(f'phase={self.phase} must be 1 or 2.')
    rates = JETMOE_PHASE_1 if self.phase == 1 else JETMOE_PHASE_2
    return MappedMixture(f'jetmoe_phase{self.phase}', rates, self.tasks).register()
