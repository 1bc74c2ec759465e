"""Give a model away: a folder with a model card, and the hub.

Nothing is sent anywhere but by `push`, which is called with a name.
"""

import json
import re
import shutil
from pathlib import Path

from huggingface_hub import (
    EvalResult,
    HfApi,
    ModelCard,
    ModelCardData,
    constants,
    get_token,
)

from practice import tiny_world
from utils.data import innermost, load_tokenizer
from utils.evaluation import FIGURES
from utils.models import load_causal_lm
from utils.runs import STAGES, find_artefacts

TAGS = ["rlhf", "ppo", "reinforcement-learning", "educational"]
CARD = """
# {title}

A causal language model of {parameters:,} parameters that goes on with the beginning of
a film review, and was trained to praise: supervised fine-tuning on reviews, a reward
model of praise and blame, and reinforcement learning with PPO against that, with a
price on the KL to the fine-tuned model. Made with {source}, to learn how that is done.

    from transformers import pipeline

    write = pipeline("text-generation", model="{name}")
    write("the film is", do_sample=True, top_k=0, max_new_tokens={max_new_tokens})

## Data and settings

* Model at the start: {model}.
* Data: {data}. The labels (praise or blame) trained the reward model.
* Preset: `{preset}`. Changed: {changes}.
{stages}

## Figures

{table}

The first figures are those of the two models on the way, on the validation split{rows};
before is before their training. All others are of this model: one response to each of
at most {prompts} held-out prompts (beginnings of validation sentences that do not stand
in the training split), sampled at temperature {temperature:g} with seed {seed}; before
is the fine-tuned model, the same prompts and the same seed. The reward model's own
figures (reward, score, J) are of what was optimised and overstate; the judges had no
part in the training{share}.

## Limits

* It praises whatever it is given, also what deserves none, and states as facts what
  it makes up. It must not be passed off as anybody's opinion.
* It continues short phrases in the style of its data, and follows no instructions.
* Its variety (distinct-2, the share of different pairs of tokens) went from
  {distinct[0]:.3f} to {distinct[1]:.3f} with PPO.
* One run, one seed, and automatic judges; nobody has looked for bias or harm.

## Licence

{licence}, as its maker states. The licences of the model at the start and of the data
hold beside it.
"""
REMEDIES = {  # by the status that the hub answers with
    401: "make a new token that may write, and set it as HF_TOKEN",
    403: "take a name of your own, or a token that may write there",
    409: "the name is taken: take another, or delete what is there",
}


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


def _stages(settings) -> str:
    """The numbers of each stage on a line; texts may be paths, and stay away."""
    made = {stage: settings.that_change(stage) for stage in STAGES}
    shared = set.intersection(*map(set, made.values()))
    lines = {"Shared": {k: x for k, x in made["sft"].items() if k in shared}}
    for title, stage in zip(("SFT", "Reward model", "PPO"), STAGES, strict=True):
        lines[title] = {k: x for k, x in made[stage].items() if k not in shared}
    return "\n".join(
        f"* {title}: "
        + ", ".join(f"{k} {x:g}" for k, x in values.items() if not isinstance(x, str))
        + "."
        for title, values in lines.items()
    )


def model_card(
    settings, metrics: dict, parameters: int, licence: str, source: str, name: str
) -> ModelCard:
    """The card of a policy, every figure of it from `metrics`, by stage.

    `metrics` has the content of the `metrics.json` of `sft`, `reward_model` and
    `policy`; `licence` is one of the hub's names for licences, such as `mit`; `source`
    says what it was made with.
    """
    before, after = (
        {k: x for stage in STAGES for k, x in metrics[stage][when].items()}
        for when in ("before", "after")
    )
    figures = {figure: FIGURES[figure] for figure in FIGURES if figure in after}
    lines = ["| | before | after |", "|---|---:|---:|"]
    for figure, (description, spec) in figures.items():
        old = format(before[figure], spec) if figure in before else ""
        lines.append(f"| {description} | {old} | {after[figure]:{spec}} |")
    model, data = public_name(settings.model_name), public_name(settings.dataset_name)
    worlds = "film-review phrases from a grammar, generated"
    data_words = _described(settings.dataset_name, worlds, "data set")
    told = [
        f"{k} {x}"
        for k, x in settings.changes.items()
        if not isinstance(x, str) or public_name(x)
    ]
    title, rows = name.split("/")[-1], metrics["reward_model"].get("validation_rows")
    gained = "; the share was estimated from the fine-tuned model's responses"
    text = CARD.format(
        title=title,
        name=name,
        parameters=parameters,
        source=source,
        max_new_tokens=settings.max_new_tokens,
        model=_described(settings.model_name, "a small GPT-2, generated", "model"),
        data=data_words,
        preset=settings.preset,
        changes="; ".join(told) or "nothing",
        stages=_stages(settings),
        table="\n".join(lines),
        rows=f" ({rows:,} rows)" if rows else "",
        prompts=settings.eval_prompts,
        temperature=settings.temperature,
        seed=settings.seed,
        share=gained if "share" in after else "",
        distinct=[before["distinct_2"], after["distinct_2"]],
        licence=licence,
    )
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=data or "generated",
            dataset_name=data_words.strip("`"),
            metric_type=figure,
            metric_name=description,
            metric_value=after[figure],
        )
        for figure, (description, _) in figures.items()
    ]
    header = ModelCardData(
        license=licence,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=TAGS,
        base_model=model,
        datasets=[data] if data else None,
        model_name=title,
        eval_results=results,
    )
    return ModelCard(f"---\n{header}\n---\n{text}")


def make_folder(settings, name: str, licence: str, source: str) -> Path:
    """Write what is given away, and nothing else: weights, tokenizer, card, metrics.

    The folder loads with plain `AutoModelForCausalLM` and `pipeline`. `name` is
    OWNER/MODEL. Raises ValueError for another form, and as `find_artefacts` does.
    """
    check_name(name)
    folders = dict(zip(STAGES, find_artefacts(settings, *STAGES), strict=True))
    metrics = {
        stage: json.loads((Path(folder) / "metrics.json").read_text())
        for stage, folder in folders.items()
    }
    lm, tokenizer = (
        load(folders["policy"]) for load in (load_causal_lm, load_tokenizer)
    )
    card = model_card(settings, metrics, lm.num_parameters(), licence, source, name)
    folder, unfinished = settings.folder / "share", settings.folder / "share.unfinished"
    for place in (unfinished, folder):
        shutil.rmtree(place, ignore_errors=True)
    lm.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    (unfinished / "README.md").write_text(str(card), encoding="utf8")
    (unfinished / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    return unfinished.rename(folder)


def check_name(name: str):
    """Raise ValueError unless it is OWNER/MODEL, in the letters that the hub takes."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name):
        raise ValueError(
            f"the name on the hub must be OWNER/MODEL, in letters, digits, . _ and -, "
            f"got {name!r}"
        )


def push(folder, name: str, private: bool = True) -> str:
    """Make the repository `name` on the hub, and send the folder there; its address.

    The token is the one of HF_TOKEN, or of `hf auth login`; it is never printed. Raises
    OSError, which quotes the innermost cause, if that does not work.
    """
    check_name(name)
    if not get_token():
        raise PermissionError(
            "there is no token of the Hugging Face Hub; make one that may write at "
            "https://huggingface.co/settings/tokens, and set it as HF_TOKEN"
        )
    api, made = HfApi(endpoint=constants.ENDPOINT), False
    try:
        made = api.create_repo(name, private=private)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="the policy")
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        remedy = REMEDIES.get(status, "try again later")
        if made:
            remedy = f"delete {name} there, and try again"
        raise OSError(
            f"cannot send {name} to the Hugging Face Hub ({innermost(error)}); {remedy}"
        ) from None
    return str(made)
