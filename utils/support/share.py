"""Give a model away: a folder with a model card, and the hub.

Nothing is sent anywhere but by `push`, which is called with a name.
"""

import dataclasses
import json
import re
from pathlib import Path

from huggingface_hub import (
    EvalResult,
    HfApi,
    ModelCard,
    ModelCardData,
    constants,
    get_token,
)

from utils.data import load_tokenizer
from utils.evaluation import FIGURES
from utils.inputs import kinds_of
from utils.lora import load_adapter, merge_adapter
from utils.models import load_causal_lm
from utils.practice import tiny_world
from utils.support.artefacts import STAGES, find_artefacts, replacing
from utils.support.run import EARLIER_FIGURES

TAGS = ["rlhf", "ppo", "reinforcement-learning", "educational"]
GROUPS = {"sft_": "SFT", "rm_": "Reward model"}  # by the beginning of a setting's name
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
{prompts} held-out prompts (beginnings of validation sentences that do not stand in the
training split), sampled at temperature {temperature:g} with seed {seed}; before is the
fine-tuned model, the same prompts and the same seed. The reward model's own figures
(reward, score, J) are of what was optimised and overstate; the judges had no part in
the training{share}.

## Limits

* It praises whatever it is given, also what deserves none, and states as facts what
  it makes up. It must not be passed off as anybody's opinion.
* It continues short phrases in the style of its data, and follows no instructions.
* Its variety (distinct-2, the share of different pairs of tokens) went from
  {distinct[0]} to {distinct[1]} with PPO.
* One run, one seed, and automatic judges; nobody has looked for bias or harm.

## Licence

{licence}, as its maker states. The licences of the model at the start and of the data
hold beside it.
"""


def public_name(name: str) -> str | None:
    """The name if it is one on the hub, and None for what lies on this machine."""
    here = Path(name).expanduser().exists() or Path(name).is_absolute()
    return None if here or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) else name


def _described(name, of_the_world, what):
    """A model or data set in words that name no folder of this machine."""
    if tiny_world.WORLD in Path(name).parents:
        return of_the_world
    hub = public_name(name)
    return f"`{hub}`" if hub else f"a {what} of its maker's own"


def _stages(settings):
    """The numbers of each stage in a line; texts may be paths, and stay away."""
    lines, shared = {}, settings.that_change("sft")
    for one in dataclasses.fields(settings):
        about = set(one.metadata["changes"]) & set(STAGES)
        stage = "Shared" if one.name in shared else "PPO"
        stage = next((s for p, s in GROUPS.items() if one.name.startswith(p)), stage)
        if one.type is not str and about:
            value = f"{one.name} {getattr(settings, one.name):g}"
            lines.setdefault(stage, []).append(value)
    return "\n".join(
        f"* {stage}: {', '.join(found)}." for stage, found in lines.items()
    )


def model_card(
    settings, metrics: dict, parameters: int, licence: str, source: str, name: str
) -> ModelCard:
    """The card of a policy, every figure of it from `metrics`, by stage.

    `metrics` has the content of the `metrics.json` of `sft`, `reward_model` and
    `policy`; `licence` is one of the hub's names for licences, such as `mit`; `source`
    says what it was made with. Raises ValueError if a stage is missing.
    """
    if missing := set(STAGES) - set(metrics):
        raise ValueError(
            f"there are no metrics of {' and '.join(sorted(missing))}; run the "
            "notebooks that make them"
        )
    before, after = {}, {}
    for stage in STAGES:
        before |= metrics[stage]["before"]
        after |= metrics[stage]["after"]
    figures = {k: v for k, v in {**EARLIER_FIGURES, **FIGURES}.items() if k in after}
    lines = ["| | before | after |", "|---|---:|---:|"]
    for figure, (description, spec) in figures.items():
        old = format(before[figure], spec) if figure in before else ""
        lines.append(f"| {description} | {old} | {after[figure]:{spec}} |")
    model, data = public_name(settings.model_name), public_name(settings.dataset_name)
    worlds = "film-review phrases from a grammar, generated"
    data_words = _described(settings.dataset_name, worlds, "data set")
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
    rows = metrics["reward_model"].get("validation_rows")
    gained = "; the share was estimated from the fine-tuned model's responses"
    text = CARD.format(
        title=name.split("/")[-1],
        name=name,
        parameters=parameters,
        source=source,
        max_new_tokens=settings.max_new_tokens,
        model=_described(settings.model_name, "a small GPT-2, generated", "model"),
        data=data_words,
        preset=settings.preset,
        changes=_changes(settings),
        stages=_stages(settings),
        table="\n".join(lines),
        rows=f" ({rows:,} rows)" if rows else "",
        prompts=f"at most {settings.eval_prompts}",
        temperature=settings.temperature,
        seed=settings.seed,
        share=gained if "share" in after else "",
        distinct=[f"{when['distinct_2']:.3f}" for when in (before, after)],
        licence=licence,
    )
    header = ModelCardData(
        license=licence,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=TAGS,
        base_model=model,
        datasets=[data] if data else None,
        model_name=name.split("/")[-1],
        eval_results=results,
    )
    return ModelCard(f"---\n{header}\n---\n{text}")


def _changes(settings):
    names = [
        one.name
        for one in dataclasses.fields(settings)
        if one.type is not str or public_name(str(getattr(settings, one.name)))
    ]
    told = [change for change in settings.changes if change.split()[0] in names]
    return "; ".join(told) or "nothing"


def whole_policy(folder):
    """The policy in a folder as one plain model: an adapter is merged into its base."""
    config = Path(folder) / "adapter_config.json"
    if not config.exists():
        return load_causal_lm(folder)
    base = load_causal_lm(json.loads(config.read_text())["base_model_name_or_path"])
    return merge_adapter(load_adapter(base, "policy", folder), "policy")


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
    lm, tokenizer = whole_policy(folders["policy"]), load_tokenizer(folders["policy"])
    card = model_card(settings, metrics, lm.num_parameters(), licence, source, name)
    with replacing(settings.folder / "share") as unfinished:
        lm.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        (unfinished / "README.md").write_text(str(card), encoding="utf8")
        text = json.dumps(metrics, indent=2) + "\n"
        (unfinished / "metrics.json").write_text(text)
    return settings.folder / "share"


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
    PermissionError without a token, or one that may not do this, FileExistsError if the
    name is taken, and ConnectionError if the hub cannot be reached or breaks off.
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
        said = _explained(error, name, made)
        raise said from None
    return str(made)


def _explained(error, name, made):
    """The same error in one sentence, with the remedy."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    rest = f"; delete {name} there, and try again" if made else ""
    if status == 401:
        return PermissionError(
            "the Hugging Face Hub does not know this token; make a new one that may "
            f"write, and set it as HF_TOKEN{rest}"
        )
    if status == 403:
        return PermissionError(
            f"this token may not write to {name}; take a name of your own, or a token "
            f"that may{rest}"
        )
    if status == 409 and not made:
        return FileExistsError(
            f"the name {name} is taken on the Hugging Face Hub; take another, or "
            "delete what is there"
        )
    why = f"it says {status}" if status else type(error).__name__
    if not status and kinds_of(error) & {"ConnectError", "TimeoutException"}:
        why = "no connection"
    return ConnectionError(
        f"{name} could not be sent to the Hugging Face Hub ({why}); try again "
        f"later{rest}"
    )
