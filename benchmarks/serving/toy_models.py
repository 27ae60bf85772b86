"""Random Llama models and what each engine wants to load of them, made once under `.bench/models`.

bf16 safetensors for vLLM, transformers and ours; GGUF by `nanoworks convert`, quantized by llama.cpp itself;
OpenVINO's files by optimum's exporter with 8-bit weights, or 4-bit ones in groups of 128.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from workload import HOME, ROOT, SIZES, VOCAB

sys.path.insert(0, str(ROOT / "scripts"))

import peers


def model_for(engine: str, precision: str, size: str) -> Path:
    """Directory that an adapter loads; made when it is not there.

    Raises subprocess.CalledProcessError, with the output of the converter, when it cannot be made.
    """
    hf = _once(HOME / "models" / size / "hf", lambda out: _make(size, out))
    if engine == "openvino":
        return _once(HOME / "models" / size / f"openvino-{precision}", lambda out: _openvino(hf, out, precision))
    if engine == "llama.cpp":
        gguf = _once(HOME / "models" / size / "gguf", lambda out: _gguf(hf, out))
        if not (gguf / f"{precision}.gguf").exists():
            _quantize(gguf, precision)
        return gguf
    return hf


def _once(target: Path, make: Callable[[Path], None]) -> Path:
    """`target`, which `make` fills under another name first, so that half of it is never taken for all."""
    if not target.exists():
        print(f"making {target.relative_to(ROOT)}", file=sys.stderr, flush=True)
        scratch = target.with_name(target.name + ".part")
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.parent.mkdir(parents=True, exist_ok=True)
        make(scratch)
        scratch.rename(target)
    return target


def _make(size: str, out: Path) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        rms_norm_eps=1e-5,
        dtype="bfloat16",
        **SIZES[size],
    )
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(previous)
    model.generation_config.eos_token_id = None
    model.save_pretrained(out)

    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [f"w{i}" for i in range(VOCAB - len(tokens))]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.ByteFallback()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(out)


def _gguf(hf: Path, out: Path) -> None:
    # Not verified here: the benchmark itself compares first tokens between the engines.
    _run([sys.executable, "-m", "nanoworks", "convert", hf, "--to", "gguf", "--out", out, "--no-verify"])
    next(out.glob("*.gguf")).rename(out / "bf16.gguf")


def _quantize(gguf: Path, kind: str) -> None:
    code = "import sys; from adapters.llama_cpp import quantize; quantize(*sys.argv[1:4], threads=2)"
    target = gguf / f"{kind}.gguf.part"
    _run([peers.python("llama.cpp"), "-c", code, gguf / "bf16.gguf", target, kind])
    target.rename(gguf / f"{kind}.gguf")


def _openvino(hf: Path, out: Path, precision: str) -> None:
    fewer_bits = ["--group-size", "128", "--sym", "--ratio", "1.0"] if precision == "int4" else []
    command = [peers.python("openvino").with_name("optimum-cli"), "export", "openvino", "-m", hf]
    command += ["--task", "text-generation-with-past", "--weight-format", precision, *fewer_bits, out]
    _run(command)


def _run(command: list[str | Path]) -> None:
    here = Path(__file__).parent
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(here)}
    done = subprocess.run([str(c) for c in command], env=environment, cwd=here, capture_output=True, text=True)
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, [str(c) for c in command], done.stdout, done.stderr)
