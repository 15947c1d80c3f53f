"""lm-eval-harness on an adapter: `--model hf --model_args pretrained=BASE,peft=FIELD`, once the method was imported.

Run it: python examples/integrations/evaluate_with_lm_eval.py BASE FIELD TASK FOLDER_OF_TASKS
"""

import sys

import lm_eval
from lm_eval.tasks import TaskManager

import residual_steer.peft  # noqa: F401 – registers the method, without which PEFT ends in KeyError: 'HRES'


def main(base, field, task, tasks=None):
    """Return a task's results with the field and without."""
    found = {}
    for name, more in (("base", ""), ("field", f",peft={field}")):
        arguments = f"pretrained={base}{more}"
        manager = TaskManager(include_path=tasks)
        options = {"model_args": arguments, "tasks": [task], "device": "cpu", "batch_size": 2, "bootstrap_iters": 0}
        found[name] = lm_eval.simple_evaluate("hf", task_manager=manager, **options)["results"][task]
    return found


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
