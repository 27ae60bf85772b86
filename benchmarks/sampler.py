"""What choosing the tokens of a step costs: `OMP_NUM_THREADS=1 python benchmarks/sampler.py [--rows 16]`.

Prints the fastest of many calls for each way to sample, on logits of a trained model's shape (a few likely tokens)
and on flat ones of a random model (every token about as likely as the next), where filters have the most to sort.
"""

from __future__ import annotations

import argparse
import time

import torch

from nanoworks.engine.adjust import Row
from nanoworks.engine.request import Request, SamplingParams
from nanoworks.engine.sampler import sample, sample_seed
from nanoworks.engine.sequence import Sequence

WAYS = {
    "greedy": SamplingParams(temperature=0),
    "temperature 0.8": SamplingParams(temperature=0.8),
    "+ top_p 0.9": SamplingParams(temperature=0.8, top_p=0.9),
    "+ top_k 50": SamplingParams(temperature=0.8, top_k=50),
    "+ min_p 0.05": SamplingParams(temperature=0.8, min_p=0.05),
    "greedy, 5 logprobs": SamplingParams(temperature=0, logprobs=5),
    "greedy, penalties, 1000 tokens": SamplingParams(temperature=0, repetition_penalty=1.1, frequency_penalty=0.1),
}


def rows(params: SamplingParams, count: int, vocab: int) -> list[Row]:
    result = []
    for i in range(count):
        prompt = torch.randint(vocab, (1000,)).tolist()
        sequence = Sequence(
            Request(prompt, params),
            0,
            max_tokens=100,
            stop_ids=frozenset(),
            seed=sample_seed(0, i),
            text=None,
            tool=None,
        )
        result.append(Row(sequence))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--repeat", type=int, default=50)
    args = parser.parse_args()
    torch.manual_seed(0)
    flat = torch.randn(args.rows, args.vocab)
    # Zipf's law with noise: about what a language model thinks of the next token.
    peaked = -1.5 * (torch.rand(args.rows, args.vocab).argsort(-1) + 1).log() + flat
    print(f"{args.rows} rows x {args.vocab} tokens, {torch.get_num_threads()} threads; fastest call in ms")
    print(f"{'':32s}{'trained':>10s}{'flat':>10s}")
    for name, params in WAYS.items():
        batch = rows(params, args.rows, args.vocab)
        times = []
        for logits in (peaked, flat):
            samples = []
            for _ in range(args.repeat + 3):
                start = time.perf_counter()
                sample(logits, batch, vocab_size=args.vocab)
                samples.append(time.perf_counter() - start)
            times.append(min(samples[3:]) * 1e3)
        print(f"{name:32s}{times[0]:10.3f}{times[1]:10.3f}")


if __name__ == "__main__":
    main()
