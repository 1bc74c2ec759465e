"""Give a model away: a folder with a model card (`card.md` is its text), and the hub.

Nothing is sent anywhere but by `push`, which is called with a name.
"""

import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, ModelCardData, constants
from huggingface_hub.utils import validate_repo_id

from practice import tiny_world
from utils.data import innermost, load_tokenizer
from utils.evaluation import FIGURES
from utils.models import load_causal_lm
from utils.runs import find_artefacts
from utils.settings import STAGES

TAGS = ["rlhf", "ppo", "reinforcement-learning", "educational"]


def public_name(name: str) -> str | None:
    """The name if it is one on the hub, and None for what lies on this machine."""
    here = Path(name).expanduser().exists() or Path(name).is_absolute()
    return None if here or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) else name


def _described(name, of_the_world, what):
    """A model or data set in words that name no folder of this machine."""
    if tiny_world.world_of(name):
        return of_the_world
    hub = public_name(name)
    return f"`{hub}`" if hub else f"a {what} of its maker's own"


def model_card(
    settings, metrics: dict, parameters: int, licence: str, source: str, name: str
) -> ModelCard:
    """The card of a policy, every figure of it from `metrics`, by stage.

    `metrics` has the content of the `metrics.json` of `sft`, `reward_model` and
    `policy`; `licence` is one of the hub's names for licences, such as `mit`; `source`
    says what it was made with. Of the settings it shows numbers: texts may be paths.
    """
    before, after = (
        {k: x for stage in STAGES for k, x in metrics[stage][when].items()}
        for when in ("before", "after")
    )
    model, data = public_name(settings.model_name), public_name(settings.dataset_name)
    changed = settings.changes.items()
    told = [f"{k} {x}" for k, x in changed if type(x) is not str or public_name(x)]
    header = ModelCardData(
        license=licence,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=TAGS,
        base_model=model,
        datasets=[data] if data else None,
    )
    words = {
        "name": name,
        "parameters": parameters,
        "source": source,
        "model": _described(settings.model_name, "a small GPT-2, generated", "model"),
        "data": _described(
            settings.dataset_name, "film-review phrases, generated", "data set"
        ),
        "changes": "; ".join(told) or "nothing",
        "settings": asdict(settings),
        "figures": FIGURES,
        "before": before,
        "after": after,
        "rows": metrics["reward_model"].get("validation_rows"),
    }
    template = Path(__file__).with_name("card.md")
    return ModelCard.from_template(header, template_path=template, **words)


def make_folder(settings, name: str, licence: str, source: str) -> Path:
    """Write what is given away, and nothing else: weights, tokenizer, card, metrics.

    The folder loads with plain `AutoModelForCausalLM` and `pipeline`. `name` is
    OWNER/MODEL. Raises ValueError for another form, and as `find_artefacts` does.
    """
    check_name(name)
    found = map(Path, find_artefacts(settings, *STAGES))
    folders = dict(zip(STAGES, found, strict=True))
    metrics = {
        stage: json.loads((folder / "metrics.json").read_text())
        for stage, folder in folders.items()
    }
    lm, folder = load_causal_lm(folders["policy"]), settings.folder / "share"
    card = model_card(settings, metrics, lm.num_parameters(), licence, source, name)
    shutil.rmtree(folder, ignore_errors=True)
    lm.save_pretrained(folder)
    load_tokenizer(folders["policy"]).save_pretrained(folder)
    card.save(folder / "README.md")
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    return folder


def check_name(name: str):
    """Raise ValueError unless it is OWNER/MODEL, in the letters that the hub takes."""
    validate_repo_id(name)
    if "/" not in name:
        raise ValueError(f"the name on the hub must be OWNER/MODEL, got {name!r}")


def push(folder, name: str, private: bool = True) -> str:
    """Make the repository `name` on the hub, and send the folder there; its address.

    The token is the one of HF_TOKEN, or of `hf auth login`; it is never printed. Raises
    OSError, which quotes the innermost cause, if that does not work.
    """
    check_name(name)
    api = HfApi(endpoint=constants.ENDPOINT)
    try:
        made = api.create_repo(name, private=private)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="the policy")
    except Exception as error:
        why = getattr(error, "server_message", None) or innermost(error)
        raise OSError(
            f"cannot send {name} to the Hugging Face Hub ({why}); take a name that is "
            "free there, and set a token that may write as HF_TOKEN; or try again later"
        ) from None
    return str(made)
