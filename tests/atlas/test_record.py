"""Records of tiny models: whole, resumable, bounded, and independent of a document's neighbours."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from openmoe.atlas import recording
from openmoe.atlas.counts import Study
from openmoe.atlas.forward import Calls, Forward
from openmoe.atlas.identities import identities
from openmoe.atlas.record import COMPLETE, Document, Header, Record, Writer, read_header
from openmoe.checkpoint.paths import Unreadable
from openmoe.config import ConfigError
from openmoe.inference.model import LanguageModel
from openmoe.layers.moe.router import expert_capacity
from tests.atlas.case import slots
from tests.inference import case

ABOUT = {'tokenizer': 'numbers'}
CAPACITY = Calls(capacity=True, length=16, rows=4, group_size=32, capacity_factor=1.0)


def texts(count=7, seed=0) -> list[Document]:
  generator = np.random.default_rng(seed)
  sizes = generator.integers(3, 40, count)
  return [
    Document(f't{i}', generator.integers(2, case.V, n).tolist(), {'source': 'ab'[i % 2]})
    for i, n in enumerate(sizes)
  ]


def columns(folder, names=None) -> dict[str, np.ndarray]:
  record = Record(folder)
  names = names or record.header.columns
  parts = list(record.parts())
  return {name: np.concatenate([part[name] for part in parts]) for name in names}


@pytest.fixture(scope='module')
def plain(tmp_path_factory):
  """Records of both models without capacity, in rows of 16."""
  found = {}
  for name in case.CONFIGS:
    found[name] = tmp_path_factory.mktemp(name) / 'record'
    recording.record(case.model(name), texts(), found[name], Calls(length=16), about=ABOUT)
  return found


@pytest.mark.parametrize('name', list(case.CONFIGS))
def test_a_record_says_what_the_model_does(name, plain):
  """Next-token probabilities are those of scoring; choices those of the router's own logits."""
  found, header = columns(plain[name]), read_header(plain[name])
  model = case.model(name)
  rows = recording.rows_of(texts()[0], model.start_id, 16)
  scores = model.score([((), rows[0][1:])])[0]
  mine = (found['document'] == 0) & (found['piece'] == 0)
  np.testing.assert_allclose(found['next_log_prob'][mine][:-1], scores.token_log_probs, atol=1e-5)
  by_probability = np.argsort(-found['probs'].astype(float), axis=2, kind='stable')
  clear = found['margin'] > 0.01
  assert clear.mean() > 0.5
  same = np.sort(by_probability[..., : header.top_k]) == np.sort(found['expert'])
  assert same.all(axis=2)[clear].all()
  kinds = [router.kind for router in header.routers]
  assert kinds == (['attention', 'mlp'] if name == 'jetmoe' else ['mlp'])


@pytest.mark.parametrize('name', list(case.CONFIGS))
def test_identities_hold(name, plain):
  for one in identities(Study(Record(plain[name]))):
    assert one.holds, one


@pytest.mark.parametrize('name', list(case.CONFIGS))
def test_without_capacity_a_document_does_not_depend_on_its_neighbours(name, plain, tmp_path):
  """Bit for bit: alone, and in another order."""
  assert read_header(plain[name]).independent
  whole, order = columns(plain[name]), [5, 2, 0]
  some = [texts()[i] for i in order]
  recording.record(case.model(name), some, tmp_path / 'r', Calls(length=16), about=ABOUT)
  found = columns(tmp_path / 'r')
  for new, old in enumerate(order):
    for column in set(found) - {'document'}:
      a, b = found[column][found['document'] == new], whole[column][whole['document'] == old]
      np.testing.assert_array_equal(a, b, err_msg=f'{column} of document {old}')


def test_slots_are_those_of_the_released_capacity(tmp_path):
  """Every group of 32 tokens, padding routed among them, by a plain loop."""
  model = case.model('openmoe', capacity=True)
  recording.record(model, texts(), tmp_path / 'r', CAPACITY, about=ABOUT)
  header, found = read_header(tmp_path / 'r'), columns(tmp_path / 'r')
  assert header.capacity == expert_capacity(32, 4, 1.0)
  assert (header.group_size, header.ignore_padding, header.independent) == (32, False, False)
  rows, at = [], 0
  for number, text in enumerate(texts()):
    for piece, row in enumerate(recording.rows_of(text, 0, 16)):
      rows.append((number, piece, len(row), at))
      at += len(row)
  # Calls of four rows; a document with its further rows begins where the waiting ones leave room.
  calls, waiting = [], []
  for number in range(len(texts())):
    mine = [row for row in rows if row[0] == number]
    if waiting and len(waiting) + len(mine) > 4:
      calls += [waiting[i : i + 4] for i in range(0, len(waiting), 4)]
      waiting = []
    waiting += mine
  calls += [waiting[i : i + 4] for i in range(0, len(waiting), 4)]
  for call in calls:
    expert = np.tile([0, 1], (4 * 16, 1))  # padding: its logits tie
    for i, (_, _, n, at) in enumerate(call):
      expert[16 * i : 16 * i + n] = found['expert'][at : at + n, 0]
    wanted = slots(expert, 32)
    for i, (_, _, n, at) in enumerate(call):
      np.testing.assert_array_equal(found['slot'][at : at + n, 0], wanted[16 * i : 16 * i + n])
  assert found['dropped'].any()
  assert all(one.holds for one in identities(Study(Record(tmp_path / 'r'))))


def test_a_broken_off_recording_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch):
  monkeypatch.setattr(recording, 'PART_TOKENS', 40)
  model = case.model('openmoe', capacity=True)
  recording.record(model, texts(), tmp_path / 'whole', CAPACITY, about=ABOUT)

  class Enough(Exception):
    pass

  def broken(progress):
    if progress.documents >= 4:
      raise Enough

  with pytest.raises(Enough):
    recording.record(model, texts(), tmp_path / 'r', CAPACITY, about=ABOUT, show=broken)
  assert not (tmp_path / 'r' / COMPLETE).exists()
  with pytest.raises(ConfigError, match='not complete'):
    Record(tmp_path / 'r')
  before = len(list((tmp_path / 'r').glob('part_*')))
  assert before
  recording.record(model, texts(), tmp_path / 'r', CAPACITY, about=ABOUT)
  files = lambda folder: {p.relative_to(folder): p.read_bytes() for p in folder.rglob('*.*')}
  assert files(tmp_path / 'r') == files(tmp_path / 'whole')


def test_a_record_of_something_else_is_not_continued(plain, tmp_path):
  with pytest.raises(ConfigError, match='another length; give another --out'):
    recording.record(case.model('openmoe'), texts(), plain['openmoe'], Calls(length=8), about=ABOUT)
  (tmp_path / 'note.txt').write_text('mine')
  with pytest.raises(ConfigError, match='no record'):
    recording.record(case.model('openmoe'), texts(), tmp_path, Calls(length=16), about=ABOUT)
  with pytest.raises(ConfigError, match='no document'):
    recording.record(case.model('openmoe'), [], tmp_path / 'r', Calls(length=16), about=ABOUT)


def test_no_capacity_where_there_is_none(tmp_path):
  with pytest.raises(ConfigError, match='has no capacity'):
    Forward(case.model('jetmoe'), CAPACITY)
  with pytest.raises(ConfigError, match='do not divide into groups'):
    Forward(case.model('openmoe', capacity=True), dataclasses.replace(CAPACITY, group_size=24))


def test_tokens_are_limited_and_progress_tells_the_time_left(tmp_path):
  seen = []
  writer = recording.record(
    case.model('openmoe'), texts(), tmp_path / 'r', Calls(length=16), about=ABOUT,
    most_tokens=50, show=seen.append,
  )  # fmt: skip
  found = columns(tmp_path / 'r', ['position'])['position']
  assert (found > 0).sum() == 50
  assert seen[0].left is not None
  assert seen[-1].share == 1.0
  assert writer.complete


@pytest.mark.parametrize(
  ('name', 'change', 'said'),
  [
    ('expert.npy', lambda x: np.where(x == x.max(), 99, x), 'outside 0 to 3'),
    ('token_id.npy', lambda x: x[:-1], 'belongs there'),
    ('weight.npy', lambda x: x.astype(np.float64), 'belongs there'),
  ],
)
def test_a_damaged_column_is_refused_by_name(name, change, said, plain, tmp_path):
  import shutil

  shutil.copytree(plain['openmoe'], tmp_path / 'r')
  path = tmp_path / 'r' / 'part_000000' / name
  np.save(path, change(np.load(path)))
  with pytest.raises(Unreadable, match=f'{name} .*{said}'):
    columns(tmp_path / 'r')
  path.write_bytes(b'\x93NUMPY\x01\x00')
  with pytest.raises(Unreadable, match='cannot be read'):
    columns(tmp_path / 'r')
  header = tmp_path / 'r' / 'header.json'
  header.write_text(json.dumps(json.loads(header.read_text()) | {'top_k': 9}))
  with pytest.raises(ConfigError, match='top_k=9'):
    Record(tmp_path / 'r')


def test_a_record_on_several_devices_is_the_same(plain, tmp_path):
  """Rows over the data axis; kernels whole, so that only rounding could differ."""
  model = case.model('openmoe', partitions=1)
  assert jax.device_count() == 8
  recording.record(model, texts(), tmp_path / 'r', Calls(length=16), about=ABOUT)
  header, found = read_header(tmp_path / 'r'), columns(tmp_path / 'r')
  assert (header.rows, header.independent) == (8, True)
  alone = columns(plain['openmoe'])
  np.testing.assert_array_equal(found['expert'], alone['expert'])
  np.testing.assert_allclose(found['weight'], alone['weight'], atol=1e-6)


def test_memory_is_a_part_however_long_the_record(tmp_path, monkeypatch):
  """The writer holds at most a part and what one call adds."""
  monkeypatch.setattr(recording, 'PART_TOKENS', 30)
  held = []
  add = Writer.add

  def watched(self, *args):
    add(self, *args)
    held.append(self._tokens)

  monkeypatch.setattr(Writer, 'add', watched)
  recording.record(case.model('openmoe'), texts(20), tmp_path / 'r', Calls(length=16), about=ABOUT)
  assert max(held) <= 30 + 45 + 3
  assert Record(tmp_path / 'r').tokens > 300


def test_a_header_is_checked():
  with pytest.raises(ConfigError, match='must be a router'):
    Header('m', 'c', 9, 4, 5, (), 't', 8, 1, 'float32', 'dropless')


def test_the_model_of_a_record_is_told_apart():
  """An override changes the fingerprint, and so the header."""
  from openmoe.layers.moe.override import Override

  model: LanguageModel = case.model('openmoe')
  override = Override.none(1, 4)
  banned = override.replace(banned_Re=override.banned_Re.at[0, 1].set(True))
  prints = {m.fingerprint for m in (model, model.overridden(override), model.overridden(banned))}
  assert len(prints) == 3
  assert model.overridden(None).fingerprint == model.fingerprint
