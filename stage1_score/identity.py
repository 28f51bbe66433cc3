"""What a scoring run would put into store.json: its identity from the config and the files of the prior."""

from importlib.metadata import version
from typing import Any

from shared.config import Config
from shared.files import sha256_of_json
from shared.pretrained import PretrainedFiles, stop_token_ids, text_digest, tokenizer_content, vocab_rows_of
from shared.score_store import SCHEMA_VERSION, Identity, Manifest, Source
from shared.statistics import STATISTICS_VERSION

_SPECIAL_TOKENS = {
    "plain": "bos if the tokenizer has one, before the prompt; eos after the completion",
    "chat_prompt": "as the template renders the prompt; eos after the completion",
    "chat": "as the template renders them",
    "tokens": "as given",
}


def build_manifest(
    config: Config,
    files: PretrainedFiles,
    tokenizer: Any,
    source: Source,
    template: str,
    dtypes: tuple[str, str],
    engine: str,
) -> Manifest:
    """The manifest of the store that this run makes.

    Args:
        template, engine: resolved, none of them `auto`.
        dtypes: of the weights and of the forward pass.
    """
    prior_config = files.config()
    quantization = prior_config.get("quantization_config")
    is_chat = template in ("chat", "chat_prompt")
    arguments = {**config.data.template_arguments, "date": config.data.template_date}
    identity = Identity(
        prior_weights=files.weights_digest(),
        prior_config=sha256_of_json(prior_config),
        quantization=None if quantization is None else sha256_of_json(quantization),
        tokenizer_files=files.tokenizer_files_digest(),
        chat_template=text_digest(tokenizer.chat_template) if is_chat else None,
        template_arguments=sha256_of_json(arguments) if is_chat else None,
        template=template,
        targets=config.data.targets,
        # Where no chat template puts several turns into a row, there is nothing to split.
        split_turns=config.data.split_turns and template == "chat",
        max_length=config.data.max_length,
        overlong=config.data.overlong,
        special_tokens=_SPECIAL_TOKENS[template],
        weight_dtype=dtypes[0],
        compute_dtype=dtypes[1],
        head_dtype="float32",
        engine=engine,
        statistics_version=STATISTICS_VERSION,
        columns=config.score.columns,
    )
    return Manifest(
        schema_version=SCHEMA_VERSION,
        fingerprint=identity.fingerprint(),
        identity=identity,
        source=source,
        prior_name=files.name,
        prior_revision=files.revision,
        vocab_size=vocab_rows_of(prior_config),
        tokenizer=tokenizer_content(tokenizer),
        stop_token_ids=tuple(stop_token_ids(files, tokenizer)),
        user_row_ids=source.columns["id"] is not None,
        software={name: version(name) for name in ("torch", "transformers", "pyarrow")},
    )
