"""The rate of vLLM's own scoring without a server; for the Python of vLLM's environment.

    PYTHON docs/benchmarks/vllm_offline.py MODEL ROWS K

Takes the rows of ``served.py`` and prints tokens a second of ``LLM.generate(prompt_logprobs=K)``.
"""

from __future__ import annotations

import json
import sys
import time

from vllm import LLM, SamplingParams


def main() -> None:
    """Measure."""
    model, rows, k = sys.argv[1], sys.argv[2], int(sys.argv[3])
    llm = LLM(
        model, dtype="float32", max_model_len=513, enforce_eager=True, max_logprobs=128,
        max_num_seqs=16, enable_prefix_caching=False,
    )  # fmt: skip
    tokenizer = llm.get_tokenizer()
    prompts = []
    with open(rows, encoding="utf-8") as stream:
        for line in list(stream)[:48]:
            row = json.loads(line)
            question = "\n".join(filter(None, (row["instruction"], row.get("input"))))
            messages = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": row["output"]},
            ]
            text = tokenizer.apply_chat_template(messages, tokenize=False)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            prompts.append({"prompt_token_ids": ids[:256]})
    sampling = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=k)
    for _ in range(2):
        start = time.perf_counter()
        llm.generate(prompts, sampling, use_tqdm=False)
        seconds = time.perf_counter() - start
    tokens = sum(len(prompt["prompt_token_ids"]) for prompt in prompts)
    print(f"offline, k = {k}: {tokens} tokens, {tokens / seconds:.0f} tokens/s")


if __name__ == "__main__":
    main()
