"""Tracing a Llama of 70 billion parameters on the meta device: seconds and peak memory.

The model is the published shape (80 layers, width 8192, 64 heads, 8 key-value heads, 28672,
vocabulary 128256) and holds no weights. It is built and traced in a fresh process; memory is the
peak of that process, and what it exceeds the peak after imports by.
"""

import sys

import torch
from harness import clock, finish, ms, peak_mib, start, table

import wspace

SHAPE = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "use_cache": False,
}
LIMIT_MIB = 2048


def main() -> None:
    options = start(__doc__)
    from transformers import LlamaConfig, LlamaForCausalLM

    rows, figures = [], {}
    ids = torch.arange(8)[None]
    tiny = LlamaConfig(**SHAPE | {"hidden_size": 64, "intermediate_size": 64}, num_hidden_layers=1)
    with torch.device("meta"):
        wspace.trace(LlamaForCausalLM(tiny).eval(), ids)  # imports and first-call set-up
    imports = peak_mib()
    for layers in (10, 20, 40, 80):
        began = clock()
        with torch.device("meta"):
            model = LlamaForCausalLM(LlamaConfig(**SHAPE, num_hidden_layers=layers)).eval()
        built = clock()
        space = wspace.trace(model, ids)
        traced = clock() - built
        count = sum(p.numel() for p in model.parameters())
        peak = peak_mib()
        figures[layers] = {
            "parameters": count,
            "build_s": built - began,
            "trace_s": traced,
            "peak_mib": peak,
            "above_imports_mib": peak - imports,
            "groups": len(space.groups),
            "coverage": space.coverage,
        }
        rows.append(
            [layers, f"{count / 1e9:.1f}", ms(built - began), ms(traced), f"{traced / layers:.4f}"]
            + [f"{peak:.0f}", f"{peak - imports:.0f}", len(space.groups), f"{space.coverage:.3f}"]
        )
    head = "layers, 10⁹ parameters, build ms, trace ms, s per layer, peak MiB, above imports MiB"
    table([*head.split(", "), "groups", "coverage"], rows)
    peak = figures[80]["peak_mib"]
    print(
        f"\npeak of the whole process {peak:.0f} MiB, limit {LIMIT_MIB} MiB (imports {imports:.0f})"
    )
    finish(options, {"imports_mib": imports, "layers": figures})
    sys.exit(peak >= LIMIT_MIB)


if __name__ == "__main__":
    main()
