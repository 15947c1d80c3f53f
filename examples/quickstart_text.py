"""Steer a language model: adapt it to a text, save the field, load it on a fresh model, and switch it off.

    python examples/quickstart_text.py --model state-spaces/mamba-130m-hf --text my.txt

Without `--model` a small byte-level GPT-2 is made here, so that nothing has to be downloaded.
"""

import argparse
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import residual_steer as rs
from residual_steer.data import ByteBlocks, TokenBlocks, english_prose
from residual_steer.training import evaluate


def fresh(name):
    """Return the frozen model, always the same."""
    if name:
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    torch.manual_seed(0)
    shape = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
    return GPT2LMHeadModel(GPT2Config(vocab_size=256, bos_token_id=0, eos_token_id=0, **shape))


def main(arguments=None):
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="on the Hugging Face Hub, or in a folder")
    parser.add_argument("--text", type=Path, help="to adapt to; English prose if left out")
    parser.add_argument("--rank", type=int, default=16, help="of the steering fields")
    parser.add_argument("--steps", type=int, default=200, help="of the optimizer")
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart_text"), help="folder of the saved field")
    options = parser.parse_args(arguments)

    text = options.text.read_bytes() if options.text else english_prose()
    if options.model:
        ids = AutoTokenizer.from_pretrained(options.model)(text.decode(), return_tensors="pt")["input_ids"][0]
        train, valid = (TokenBlocks(ids, 64, split) for split in ("train", "valid"))
    else:
        train, valid = (ByteBlocks(text, 64, split) for split in ("train", "valid"))
    valid = DataLoader(torch.utils.data.Subset(valid, range(min(len(valid), 64))), batch_size=16)

    model = rs.steer(fresh(options.model), rank=options.rank)  # the same object, frozen; it computes what it did before
    print(rs.summary(model))
    before = evaluate(model, valid)["loss"]
    rs.fit(model, DataLoader(train, batch_size=16, shuffle=True), steps=options.steps, lr=1e-2)
    after = evaluate(model, valid)["loss"]
    print(f"held-out loss: {before:.4f} frozen, {after:.4f} steered")

    rs.save(model, options.out)  # safetensors and JSON
    again = rs.load(fresh(options.model), options.out)
    print(f"on a fresh model: {evaluate(again, valid)['loss']:.4f}")
    with rs.use(again, None):  # off, for as long as the block lasts
        print(f"switched off: {evaluate(again, valid)['loss']:.4f}")
    start = torch.tensor([list(b"The ")]) if not options.model else train[0]["input_ids"][None, :8]
    made = again.eval().generate(start, max_new_tokens=24, attention_mask=torch.ones_like(start), pad_token_id=0)
    print(f"generated: {bytes(made[0].tolist()) if not options.model else made[0].tolist()}")


if __name__ == "__main__":
    main()
