"""What a checkpoint says of itself: the one answer to "which model is this?".

Training, upcycling and conversion write a Description into the metadata of every checkpoint;
generation, evaluation and conversion read it from there and from nowhere else. It is data: reading
it imports, evaluates and parses nothing but JSON.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from collections.abc import Mapping
from typing import Any

from openmoe.checkpoint import fields
from openmoe.checkpoint.paths import Unreadable, absolute, is_remote, read_small, write_whole
from openmoe.config import ConfigError, ModelConfig, OptimizerConfig, OptimizerName

FORMAT = 1
KINDS = ('sentencepiece', 'tokenizer.json', 'bytes')
KEY = 'description'  # of the checkpoint's metadata
LARGEST_VOCABULARY = 32 << 20  # bytes of a SentencePiece model that a run directory keeps


@dataclasses.dataclass(frozen=True)
class AddedToken:
  """A token that was added to a SentencePiece model from outside."""

  piece_text: str
  id: int


@dataclasses.dataclass(frozen=True)
class VocabularyRecord:
  """Which vocabulary the tokens are of.

  Attributes:
    kind: 'sentencepiece', 'tokenizer.json', or 'bytes' (seqio's ByteVocabulary, without a file).
    digest: sha256 of the file, hexadecimal.
    path: where the file was; a hint only, as what is opened is checked by its digest.
    extra_ids: sentinels behind the pieces.
    added: tokens that the file itself does not have.
  """

  kind: str
  digest: str = ''
  path: str = ''
  extra_ids: int = 0
  added: tuple[AddedToken, ...] = ()

  def __post_init__(self):
    if self.kind not in KINDS:
      raise ConfigError(f'kind={fields.shown(self.kind)} must be one of {list(KINDS)}.')
    if self.kind != 'bytes' and not re.fullmatch('[0-9a-f]{64}', self.digest):
      raise ConfigError(f'digest={fields.shown(self.digest)} must be 64 hexadecimal digits.')
    if self.extra_ids > 1 << 20:
      raise ConfigError(f'extra_ids={self.extra_ids} must be at most {1 << 20}.')
    if len(self.added) > fields.LONGEST_LIST:
      raise ConfigError(
        f'{len(self.added)} added tokens are more than {fields.LONGEST_LIST}, which a description '
        'holds; give a tokenizer.json, which has them inside.'
      )

  @property
  def file_name(self) -> str:
    """Name of the file's copy in a run directory; content decides it, so it never changes."""
    suffix = '.json' if self.kind == 'tokenizer.json' else '.model'
    return f'vocabulary_{self.digest[:16]}{suffix}'


@dataclasses.dataclass(frozen=True)
class ChatRecord:
  """A chat template that came with the weights.

  Attributes:
    name: of the folder that it came in.
    template_text: Jinja; rendered in a sandbox, see openmoe.inference.chat.
    bos_text, eos_text: what stands for these tokens in its result.
  """

  name: str
  template_text: str
  bos_text: str = ''
  eos_text: str = ''

  def __post_init__(self):
    for name in ('template_text', 'bos_text', 'eos_text'):
      if len(getattr(self, name)) > fields.LONGEST_TEXT:
        raise ConfigError(
          f'{name} has {len(getattr(self, name))} characters, more than the {fields.LONGEST_TEXT} '
          'of any template; remove it from the folder.'
        )


@dataclasses.dataclass(frozen=True)
class OptimizerRecord:
  """How the optimizer state lies.

  Attributes:
    name: as in OptimizerConfig.
    place: path of the optimizer's own state; below `opt_state`, one link of the chain when
      gradients are clipped.
  """

  name: OptimizerName
  place: str = 'opt_state'

  def __post_init__(self):
    parts = self.place.split('/')
    if parts[0] != 'opt_state' or len(parts) > 4 or not all(p.isdigit() for p in parts[1:]):
      raise ConfigError(f'place={fields.shown(self.place)} must be opt_state or opt_state/NUMBER.')


@dataclasses.dataclass(frozen=True)
class Description:
  """Everything that whoever opens a checkpoint has to know.

  Attributes:
    model: the whole configuration.
    version: of this format.
    vocabulary: None where whoever wrote the checkpoint had none.
    row_length: tokens of a training row, or of the context an imported model was made for.
    pad_id, start_id: tokens that fill a row and that begin it.
    eos_ids: tokens that end a text; the first one is what training appends.
    chat: how a conversation becomes a prompt; None for the template of the architecture.
    objective: of the last stage: 'causal', 'prefix', or None where nothing was trained here.
    tokens_seen: of training, None where it is not known.
    optimizer: how its state lies, None without one.
  """

  model: ModelConfig
  version: int = FORMAT
  vocabulary: VocabularyRecord | None = None
  row_length: int | None = None
  pad_id: int = 0
  start_id: int = 0
  eos_ids: tuple[int, ...] = (1,)
  chat: ChatRecord | None = None
  objective: str | None = None
  tokens_seen: int | None = None
  optimizer: OptimizerRecord | None = None

  def __post_init__(self):
    ids = {'pad_id': (self.pad_id,), 'start_id': (self.start_id,), 'eos_ids': self.eos_ids}
    for name, values in ids.items():
      if not values or max(values) >= self.model.vocab_size:
        raise ConfigError(
          f'{name}={list(values)} must be one token or more below vocab_size='
          f'{self.model.vocab_size}.'
        )
    if self.row_length is not None and self.row_length < 1:
      raise ConfigError(f'row_length={self.row_length} must be at least 1, or null.')

  def plain(self) -> dict[str, Any]:
    """As values for JSON."""
    return fields.plain(self)


def model_fields(config: ModelConfig) -> dict[str, Any]:
  """All fields as plain values, for JSON; --model=FILE.json takes them."""
  return fields.plain(config)


def identity(model: ModelConfig) -> dict:
  """The fields that decide the shapes of parameters, and whose they are."""
  names = ('vocab_size', 'num_layers', 'embed_dim', 'mlp_dim', 'num_heads', 'head_dim')
  found = {name: getattr(model, name) for name in ('name', *names, 'num_sparse_layers')}
  found['num_experts'] = model.moe.num_experts if model.moe else 0
  return found | {'architecture': model.architecture.value}


def _flatten(tree: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  flat = {}
  for key, value in tree.items():
    if isinstance(value, Mapping):
      flat |= _flatten(value, f'{prefix}{key}.')
    else:
      flat[prefix + key] = value
  return flat


def identity_differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
  """One phrase per field whose value differs, `name is SAVED there and CURRENT here`.

  Nested fields are named with dots; a field that one side lacks is `absent`. The architecture may
  be absent there: before there were two, an identity did not say which.
  """
  if 'architecture' in current:
    saved = {'architecture': current['architecture'], **saved}
  old, new = _flatten(saved), _flatten(current)
  return [
    f'{name} is {old.get(name, "absent")!r} there and {new.get(name, "absent")!r} here'
    for name in sorted(old.keys() | new.keys())
    if name not in old or name not in new or old[name] != new[name]
  ]


def optimizer_record(config: OptimizerConfig) -> OptimizerRecord:
  """Where openmoe.optimizer.make_optimizer puts the state."""
  # optax.chain: the clipping is link 0, without a state; the optimizer is link 1.
  clipped = config.clip_global_norm is not None
  return OptimizerRecord(config.name, 'opt_state/1' if clipped else 'opt_state')


# --- reading


def read_description(told: object, where: str) -> Description:
  """A description that a file holds.

  Args:
    told: what JSON gave.
    where: the file, for messages.

  Raises:
    ConfigError: it is damaged, or of a newer format.
  """
  version = told.get('version') if isinstance(told, Mapping) else None
  if isinstance(version, int) and not isinstance(version, bool) and version > FORMAT:
    raise ConfigError(
      f'{where} is a description of format {fields.shown(version)}, and this version of the '
      f'project reads formats up to {FORMAT}; update the project.'
    )
  found = fields.read(Description, told, where)
  if found.version != FORMAT:
    raise ConfigError(f'{where}: version={found.version} must be {FORMAT}; {fields.REMEDY}.')
  return found


def of_metadata(facts: object, where: str) -> Description | None:
  """The description in a checkpoint's metadata file, also in one of before there were any.

  Args:
    facts: content of the file: step, identity, metadata.

  Returns:
    None for a checkpoint that tells its sizes alone.

  Raises:
    ConfigError: what is there is damaged.
  """
  about = facts.get('metadata', {}) if isinstance(facts, Mapping) else None
  if not isinstance(about, Mapping):
    raise ConfigError(f'{where} has no metadata; {fields.REMEDY}.')
  if KEY in about:
    return read_description(about[KEY], f'{where}: {KEY}')
  if 'model' not in about:
    return None
  model = fields.read(ModelConfig, about['model'], f'{where}: model')
  told: dict[str, Any] = {}
  lengths, tokens = about.get('task_feature_lengths'), about.get('hf_fields')
  if isinstance(lengths, Mapping):
    told['row_length'] = sum(n for n in lengths.values() if isinstance(n, int)) or None
  if isinstance(tokens, Mapping):  # of an import; nothing but numbers is taken
    told |= _tokens(tokens)
  if isinstance(about.get('tokens_seen'), int):
    told['tokens_seen'] = about['tokens_seen']
  return read_description({'model': model_fields(model), 'version': FORMAT} | told, where)


def _tokens(old: Mapping[str, Any]) -> dict[str, Any]:
  """Fields of a config.json that imports kept before there were descriptions."""
  names = {'pad_token_id': 'pad_id', 'bos_token_id': 'start_id'}
  found = {ours: old[theirs] for theirs, ours in names.items() if old.get(theirs) is not None}
  eos = old.get('eos_token_id')
  if eos is not None:
    found['eos_ids'] = eos if isinstance(eos, list) else [eos]
  if old.get('max_position_embeddings') is not None:
    found['row_length'] = old['max_position_embeddings']
  return found


def undescribed(path: object, told: Mapping[str, Any]) -> str:
  """The message about a checkpoint that tells its sizes alone."""
  known = ', '.join(f'{k}={fields.shown(v)}' for k, v in told.items()) or 'nothing'
  return (
    f'{path} was written before checkpoints described their model (it tells {known}): say which it '
    'is, model=NAME or FILE.json (--model), a published size or the fields of '
    'openmoe.config.ModelConfig.'
  )


# --- the vocabulary's file


def vocabulary_record(
  kind: str, path: str, extra_ids: int, content: bytes, added: Mapping[str, int] | None = None
) -> VocabularyRecord:
  """The record of a vocabulary's file, and of tokens that were added to it: text -> id."""
  hint = path if path.isprintable() and len(path) <= fields.LONGEST_LINE else ''
  tokens = tuple(AddedToken(text, token) for text, token in (added or {}).items())
  return VocabularyRecord(kind, digest_of(content) if content else '', hint, extra_ids, tokens)


def digest_of(content: bytes) -> str:
  return hashlib.sha256(content).hexdigest()


def keep_vocabulary(run: os.PathLike | str, record: VocabularyRecord, content: bytes) -> None:
  """Puts a vocabulary's file into a run directory, unless it is there or too large."""
  target = absolute(run) / record.file_name
  if record.kind == 'bytes' or len(content) > LARGEST_VOCABULARY or target.exists():
    return
  target.parent.mkdir(parents=True, exist_ok=True)
  write_whole(target, content)


def kept_vocabulary(run: os.PathLike | str, record: VocabularyRecord) -> bytes:
  """Content of the described file's copy in the run directory; empty where there is none.

  Raises:
    ConfigError: another file lies there, or it cannot be read.
  """
  there = record.kind != 'bytes' and (absolute(run) / record.file_name).exists()
  return find_vocabulary(run, record) if there else b''


def find_vocabulary(run: os.PathLike | str, record: VocabularyRecord) -> bytes:
  """Content of the described file: of the copy in the run directory, else of where it was.

  Raises:
    ConfigError: it is in neither place, or what is there is another one.
  """
  kept = absolute(run) / record.file_name
  # The path is what a stranger's checkpoint says: nothing but a local file is opened for it.
  places = [kept, *([absolute(record.path)] if record.path and not is_remote(record.path) else ())]
  remedy = f'put it at {kept}, or give it, vocabulary=PATH (--vocabulary=PATH)'
  for place in places:
    if not place.exists():
      continue
    try:
      content = read_small(place, LARGEST_VOCABULARY)
    except (OSError, Unreadable) as error:
      raise ConfigError(f'The vocabulary {place} cannot be read: {error}; {remedy}.') from error
    check_vocabulary(record.kind, content, record, str(place), remedy)
    return content
  raise ConfigError(
    f'The vocabulary of {run} is neither at {kept} nor at {fields.shown(record.path)}; {remedy}.'
  )


def check_vocabulary(
  kind: str, content: bytes, record: VocabularyRecord, where: str, remedy: str
) -> None:
  """Raises ConfigError unless a file, of some kind, is the described vocabulary."""
  found = digest_of(content)
  if (kind, found) != (record.kind, record.digest):
    described = f'{record.kind} {record.digest[:16]}...' if record.digest else record.kind
    raise ConfigError(
      f'{where} is not the vocabulary that the checkpoint was made with: it is {kind} of sha256 '
      f'{found[:16]}..., described is {described}; {remedy}.'
    )
