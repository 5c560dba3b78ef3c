"""For vLLM: hands the hidden states of prompts to kdrun through a folder, and takes weights in.

This file belongs into the server's environment: it imports vLLM and nothing of kdrun. ``kdrun
served connector`` writes it, and prints how a server is started with it.

States are written only for requests with ``kv_transfer_params`` of ``{"kdrun": {"first": N}}``:
those of the prompt's tokens from number N on, before the final norm, in the model's own type. A
file appears whole under the name that the reply gives, or another beside it says why there is none.
The reader removes it; what nobody read is removed after ten minutes.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import save_file
from vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector import (
    ExampleHiddenStatesConnector,
    PendingSave,
    extract_from_kv_cache,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.utils.gpu_sync_debug import gpu_sync_allowed

KEPT_S = 600


@dataclass
class _Save(PendingSave):
    """The states of a request that are still to be written, from token ``first`` on."""

    first: int = 0


class _Copied:
    """Stands for the event of a copy that is complete already."""

    def query(self) -> bool:
        return True


class KdrunStates(ExampleHiddenStatesConnector):
    """vLLM's example of such a connector, but on every device and for marked requests alone."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.use_lock = False  # a file that is renamed into place needs none
        self._writers = ThreadPoolExecutor(2, "kdrun-states")
        os.makedirs(self._storage_path, mode=0o700, exist_ok=True)

    def request_finished(self, request: Any, block_ids: list[int]) -> Any:
        """Keep the blocks of a marked request until its states are copied (in the scheduler)."""
        wanted = (request.kv_transfer_params or {}).get("kdrun")
        if not isinstance(wanted, dict):
            self._request_filenames.pop(request.request_id, None)
            return False, None
        waits, reply = super().request_finished(request, block_ids)
        if waits:
            plain = self._pending_saves[request.request_id]
            self._pending_saves[request.request_id] = _Save(
                **vars(plain), first=int(wanted.get("first", 0))
            )
        return waits, reply

    def _submit_async_write(self, pending: Any) -> None:
        """Copy the states of a request out of the cache, and write them (in the worker)."""
        if not self._is_tp_rank_zero:
            return
        blocks = torch.tensor(pending.block_ids, dtype=torch.long)
        within = torch.arange(self._block_size)
        slots = (blocks[:, None] * self._block_size + within).flatten()
        wanted = slots[pending.first : len(pending.token_ids)]
        with gpu_sync_allowed():
            states = extract_from_kv_cache(
                self._kv_cache, wanted.to(self._kv_cache.device), len(wanted)
            ).cpu()
        tensors = {"states": states.contiguous(), "token_ids": pending.token_ids}
        self._req_copy_events[pending.req_id] = _Copied()
        self._writers.submit(_write, tensors, pending.filename)


class KdrunWorker:
    """An extension of vLLM's workers: takes in weights, those of a tied head included.

    On a CPU vLLM keeps a packed copy of the head, which its own reloading leaves as it is where the
    head has the weights of the embeddings.
    """

    def kdrun_take_in(self, folder: str) -> None:
        """Load the weights of a folder in place."""
        self.reload_weights(weights_path=folder)  # type: ignore[attr-defined]
        for layer in self.model_runner.model.modules():  # type: ignore[attr-defined]
            if isinstance(layer, ParallelLMHead) and hasattr(layer, "cpu_linear"):
                layer.quant_method.process_weights_after_loading(layer)


def _write(tensors: dict[str, torch.Tensor], filename: str) -> None:
    _remove_unread(os.path.dirname(filename))
    partial = filename + ".partial"
    try:
        save_file(tensors, partial)
        os.replace(partial, filename)
    except Exception as error:  # whatever it is, the reader must not wait for nothing
        with suppress(OSError):
            os.unlink(partial)
        with suppress(OSError), open(filename + ".failed", "w", encoding="utf-8") as stream:
            stream.write(str(error))


def _remove_unread(folder: str) -> None:
    now = time.time()
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            ours = ".safetensors" in entry.name
            with suppress(OSError):
                if ours and now - entry.stat(follow_symlinks=False).st_mtime > KEPT_S:
                    os.unlink(entry.path)
