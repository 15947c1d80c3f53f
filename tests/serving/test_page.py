"""The page docs/how-to/serve-with-vllm.md, as somebody new to it follows it."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import proof

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "serve-with-vllm.md"
FENCE = re.compile(r"^```(\w+)(?: title=\"(\S+)\")?\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def test_from_save_to_a_running_server_and_a_client(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = FENCE.findall(PAGE.read_text("utf-8"))
    served = next(code for language, _, code in blocks if code.startswith("vllm serve"))
    steps = [(title, code) for language, title, code in blocks if language == "python"]
    space = {}
    for _, code in steps[:2]:
        exec(code, space)
    assert {path.name for path in (tmp_path / "fields").iterdir()} == {"law", "river"}
    capsys.readouterr()
    with proof.serve(shlex.split(served.replace("\\\n", ""))[2:], tmp_path) as address:
        for _, code in steps[2:4]:
            exec(code.replace("http://localhost:8000", address), space)
    out = capsys.readouterr().out
    models, base, law, river, loaded, bad, unloaded = out.splitlines()
    assert json.loads(models.replace("'", '"')) == ["base", "law", "river"]
    texts = [line.partition(" ")[2] for line in (base, law, river)]
    assert len(set(texts)) == 3
    assert "adapter 'mix' added" in loaded
    assert bad.startswith("could not read a field from")
    assert "adapter 'mix' removed" in unloaded
    ((title, code),) = [step for step in steps if step[0]]
    Path(title).write_text(code)
    done = subprocess.run([sys.executable, title], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    offline = [line for line in done.stdout.splitlines() if line.startswith(("'", '"'))]
    assert (offline[0], offline[2]) == (texts[1], texts[0])
    assert offline[1] not in texts
