"""`python -m compressor.demo` writes the questions of the demo's tasks anew, beside their task files."""

from compressor.demo import TASKS
from compressor.demo.world import TASK_NAMES, task_documents, write_jsonl

for name in TASK_NAMES:
    write_jsonl(TASKS / f"{name}.jsonl", task_documents(name))
