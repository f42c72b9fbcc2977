"""GPTQ by llm-compressor, for `bench_gptq_peer` and `wikitext_compression`: a script for an environment of its own.

    PYTHON llmcompressor_gptq.py MODEL TOKENS BATCH THREADS

For every line of JSON on stdin, {"samples", "bits", "group" (a number or "channel"), "act_order" ("static" or null),
"out" (a file or null)}, it quantizes a fresh copy of MODEL (a Hugging Face folder) on that many rows of TOKENS (a .npy
file of int64), writes the dequantized weights to the safetensors file "out" and prints [seconds, CPU seconds] as JSON;
`versions` answers with the versions instead.
"""

import copy
import json
import sys
import time
from importlib.metadata import version

import numpy
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast


def main(folder: str, tokens: str, batch: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    names = {name for name, _ in model.named_parameters()}
    rows = torch.from_numpy(numpy.load(tokens))
    data = Dataset.from_dict({"input_ids": rows.tolist(), "attention_mask": torch.ones_like(rows).tolist()})
    data = data.with_format("torch")
    unused = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))  # it asks for one beside any data
    for line in sys.stdin:
        if line.strip() == "versions":
            found = {name: version(name) for name in ("llmcompressor", "compressed-tensors", "torch", "transformers")}
            print(json.dumps(found), flush=True)
            continue
        asked, changed = json.loads(line), copy.deepcopy(model)
        count, group = asked["samples"], asked["group"]
        cut = {"strategy": "channel"} if group == "channel" else {"strategy": "group", "group_size": group}
        weights = QuantizationArgs(num_bits=asked["bits"], symmetric=True, **cut)
        loader = DataLoader(data.select(range(count)), batch_size=int(batch))
        groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
        order = asked["act_order"]
        recipe = GPTQModifier(
            config_groups=groups, ignore=["lm_head"], block_size=128, dampening_frac=0.01, actorder=order
        )
        began, used = time.perf_counter(), time.process_time()
        oneshot(
            model=changed,
            processor=unused,
            dataset=loader,
            recipe=recipe,
            num_calibration_samples=count,
            pipeline="sequential",
        )
        spent = [time.perf_counter() - began, time.process_time() - used]
        if asked["out"]:
            state = {name: tensor.clone() for name, tensor in changed.state_dict().items() if name in names}
            save_file(state, asked["out"])
        print(json.dumps(spent), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
