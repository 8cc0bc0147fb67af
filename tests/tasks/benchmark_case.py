"""A few records of every benchmark, in the columns that are published."""

ARC = [
  {
    'question': f'Why {i}?',
    'choices': {'text': [f'w{i}', f'x{i}', f'y{i}', f'z{i}'], 'label': list('ABCD')},
    'answerKey': 'ABCD'[i % 4],
  }
  for i in range(30)
]
HELLASWAG = [
  {
    'activity_label': 'Cooking',
    'ctx_a': f'[header] How to boil {i} [title] Water  is hot.',
    'ctx_b': 'the pot',
    'endings': ['boils.', 'sings [step] loud.', 'runs.', 'sleeps.'],
    'label': str(i % 4),
  }
  for i in range(12)
]
MMLU = [
  {'subject': 'high_school_physics', 'question': f'q{i} ', 'choices': list('wxyz'), 'answer': i % 4}
  for i in range(6)
]
DATA = {
  'triviaqa/validation': [
    {'question': 'Who?', 'answer': {'value': 'X', 'aliases': ['Xi', 'The Y']}}
  ],
  'mmlu/test': MMLU,
  'mmlu/dev': MMLU,
  'arc_challenge/test': ARC,
  'arc_challenge/train': ARC,
  'boolq/validation': [{'passage': r'a \1 b', 'question': 'is it', 'answer': True}],
  'lambada/test': [{'text': 'He went to the door'}],
  'humaneval/test': [
    {
      'task_id': 'HumanEval/0',
      'prompt': 'def one():\n  """Returns 1."""\n',
      'test': 'def check(candidate):\n  assert candidate() == 1\n',
      'entry_point': 'one',
    }
  ],
  'gsm8k/test': [{'question': f'{i}?', 'answer': f'so\n#### 1,00{i}'} for i in range(3)],
  'gsm8k/train': [{'question': f't{i}', 'answer': f'#### {i}'} for i in range(9)],
  'mbpp/test': [{'task_id': 11, 'text': 'One.', 'code': '', 'test_list': ['assert one() == 1']}],
  'mbpp/prompt': [
    {'task_id': i, 'text': f't{i}', 'code': 'c\r\n', 'test_list': ['assert a', 'assert b']}
    for i in (1, 2, 3, 4)
  ],
  'hellaswag/validation': HELLASWAG,
  'hellaswag/train': HELLASWAG,
  'winogrande/validation': [
    {'sentence': f'A hit B, so _ fell {i}.', 'option1': 'A', 'option2': 'B', 'answer': '2'}
    for i in range(7)
  ],
  'winogrande/train': [
    {'sentence': f'_ ran {i}.', 'option1': 'A', 'option2': 'B', 'answer': '1'} for i in range(7)
  ],
  'truthfulqa/validation': [
    {'question': 'Is it?', 'mc2_targets': {'choices': ['no', 'yes', 'so'], 'labels': [1, 0, 1]}}
  ],
  'piqa/validation': [{'goal': 'Sit', 'sol1': 'on a chair', 'sol2': 'on fire', 'label': 0}],
}
