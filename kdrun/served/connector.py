"""Writes the connector for a server's environment, and says how a server is started with it."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

from kdrun.models.context import load_model_config
from kdrun.models.locate import locate_model
from kdrun.paths import make_output_folder
from kdrun.served.states import FOLDER

MODULE = "kdrun_states"
_CLASS = "KdrunStates"
_SOURCE = Path(__file__).with_name("vllm_states.py")


def write_connector(folder: Path) -> Path:
    """Write the connector as a module into a folder.

    Raises:
        InputError: the folder cannot be written.
    """
    make_output_folder(folder)
    path = folder / f"{MODULE}.py"
    shutil.copyfile(_SOURCE, path)
    return path


def start_line(
    model: str,
    module_folder: Path,
    states_folder: str | None,
    writes_student: bool,
    trust_remote_code: bool,
) -> str:
    """Return the command that starts a server for kdrun.

    Args:
        model: folder or hub id.
        module_folder: where the module is.
        states_folder: for the states; None is in memory.
        writes_student: whether the server writes the student's answers, with weights that it takes
            in, rather than giving a teacher's states.
        trust_remote_code: run the code that comes with the model, to read its configuration.

    Raises:
        InputError: there is no such model.
    """
    source = locate_model(model)
    given = str(Path(source.path).resolve()) if source.is_local else source.path
    words = ["python", "-m", "vllm.entrypoints.openai.api_server", "--model", given]
    words += ["--host", "127.0.0.1", "--port", "8000"]
    words += ["--worker-extension-cls", f"{MODULE}.KdrunWorker"]
    before = f"PYTHONPATH={shlex.quote(str(module_folder.resolve()))}"
    if writes_student:
        before += " VLLM_SERVER_DEV_MODE=1"  # lets it take weights in
    else:
        config = load_model_config(source, trust_remote_code).get_text_config()
        words += _gives_states(config.num_hidden_layers, states_folder or FOLDER)
    return f"{before} {shlex.join(words)}"


def _gives_states(layers: int, folder: str) -> list[str]:
    speculative = {
        "method": "extract_hidden_states",
        "num_speculative_tokens": 1,
        "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": [layers]}},
    }
    transfer = {
        "kv_connector": _CLASS,
        "kv_connector_module_path": MODULE,
        "kv_role": "kv_producer",
        "kv_connector_extra_config": {"shared_storage_path": folder},
    }
    options = ["--no-enable-prefix-caching", "--speculative-config", json.dumps(speculative)]
    return [*options, "--kv-transfer-config", json.dumps(transfer)]
