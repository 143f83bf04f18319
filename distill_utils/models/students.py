"""Students cut from a teacher or drawn anew: which layers to keep, the copy itself, freezing and counting."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from distill_utils.artifacts import InputError
from distill_utils.models.loading import FAMILIES, check_same_tokenizer, load_config, load_tokenizer, size_t5_cache

# Layers to copy, {teacher depth: {student depth: ids}}: Shleifer & Rush (2020), the tables of their released code.
LAYERS_TO_COPY = {
    6: {1: [0], 2: [0, 5], 3: [0, 2, 5], 4: [0, 1, 3, 5]},
    12: {1: [0], 2: [0, 6], 3: [0, 6, 11], 4: [0, 4, 8, 11], 6: [0, 2, 4, 7, 9, 11], 9: [0, 1, 2, 4, 5, 7, 9, 10, 11]},
    16: {
        1: [0],
        2: [0, 15],
        3: [0, 8, 15],
        4: [0, 5, 10, 15],
        6: [0, 3, 6, 9, 12, 15],
        8: [0, 2, 4, 6, 8, 10, 12, 15],
        9: [0, 1, 3, 5, 7, 9, 11, 13, 15],
        12: [0, 1, 2, 3, 4, 5, 6, 7, 9, 11, 13, 15],
    },
}
# Layers to imitate: the end of the block of teacher layers that a student layer replaces. Same source.
LAYERS_TO_SUPERVISE = {
    6: {1: [5], 2: [3, 5], 3: [1, 4, 5], 4: [1, 2, 4, 5]},
    12: {1: [11], 2: [5, 11], 3: [3, 7, 11], 6: [1, 3, 5, 8, 10, 11]},
    16: {1: [15], 4: [4, 9, 12, 15], 8: [1, 3, 5, 7, 9, 11, 13, 15]},
}

# Sizes that follow a model's width; T5 and the others name them differently.
SHRINKING = (
    "num_heads", "encoder_attention_heads", "decoder_attention_heads", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim",
)  # fmt: skip


# ----------------------------------------------------------------------------------------------------- layers to keep


def layer_map(teacher_layers: int, student_layers: int) -> list[int]:
    """Return the teacher layers to copy: the published table for 6, 12 and 16 layers, else evenly spaced ids."""
    named = maps(teacher_layers, student_layers)
    return named.get("published", named["spaced"])


def maps(teacher_layers: int, student_layers: int) -> dict[str, list[int]]:
    """Return the maps that need no data, {name: teacher layers}: published (where a table has it), spaced, first, last.

    Spaced ids keep the first and the last layer; a single layer is the first, which the authors' logs favour.
    Several names may give the same layers. Raises InputError when the depth is impossible.
    """
    _check_depth("student_layers", student_layers, teacher_layers)
    published = LAYERS_TO_COPY.get(teacher_layers, {}).get(student_layers)
    step = (teacher_layers - 1) / max(student_layers - 1, 1)
    return {
        **({"published": list(published)} if published else {}),
        "spaced": [int(i * step + 0.5) for i in range(student_layers)],
        "first": list(range(student_layers)),
        "last": list(range(teacher_layers - student_layers, teacher_layers)),
    }


def supervision_map(teacher_layers: int, student_layers: int) -> list[int]:
    """Return the teacher layers whose outputs the student's layers should imitate, the last one always among them.

    A student layer stands for a block of teacher layers, so its output belongs to the block's *end*, whereas
    `layer_map` names the layer it was copied from. Raises InputError when the depth is impossible.
    """
    _check_depth("student_layers", student_layers, teacher_layers)
    published = LAYERS_TO_SUPERVISE.get(teacher_layers, {}).get(student_layers)
    return list(published or (int((i + 1) * teacher_layers / student_layers + 0.5) - 1 for i in range(student_layers)))


def _check_depth(name: str, layers: int, teacher_layers: int) -> None:
    if type(layers) is not int or not 1 <= layers <= teacher_layers:  # True is an int, too
        raise InputError(f"{name} is {layers!r}: the teacher has {teacher_layers} layers, give 1 to {teacher_layers}")


def parse_shape(shape: str, teacher: PreTrainedModel) -> tuple[int, int]:
    """Return (encoder layers, decoder layers) of a shape like "6-3", checked against the teacher's depths."""
    try:
        encoder, decoder = (int(part) for part in shape.split("-"))
    except ValueError as error:
        raise InputError(f"student shape {shape!r} is not a shape: write encoder-decoder layers, as in 6-3") from error
    layer_map(len(encoder_layers(teacher)), encoder)
    layer_map(len(decoder_layers(teacher)), decoder)
    return encoder, decoder


def check_layer_ids(name: str, ids: Sequence[int], layers: int, teacher_layers: int) -> list[int]:
    """Return the ids; InputError for ids not in the teacher, named twice, or not as many as the student has layers."""
    known = all(type(i) is int and 0 <= i < teacher_layers for i in ids)
    if not known or len(set(ids)) != len(ids) or len(ids) != layers:
        raise InputError(f"{name} is {list(ids)}: give {layers} different ids from 0 to {teacher_layers - 1}")
    return list(ids)


# ------------------------------------------------------------------------------------------------------------ the cut


def encoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the encoder's layers, whatever the family calls them."""
    return _layers(model.get_encoder())


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the decoder's layers, whatever the family calls them."""
    return _layers(model.get_decoder())


def _layers(stack: nn.Module) -> nn.ModuleList:
    return stack.block if hasattr(stack, "block") else stack.layers


def init_student(
    teacher: PreTrainedModel,
    encoder_layers: int,
    decoder_layers: int,
    encoder_layer_ids: Sequence[int] | None = None,
    decoder_layer_ids: Sequence[int] | None = None,
    share_weights: bool = False,
) -> tuple[PreTrainedModel, list[int], list[int]]:
    """Return a student made of some of the teacher's layers, and the encoder and decoder layer ids it kept.

    All but the dropped layers is copied: embeddings, norms, head, weights' dtypes and device, generation settings.
    The student is in eval mode, all of it trainable, and shares no memory with the teacher; with `share_weights` it is
    a frozen view on the teacher's own tensors, made in milliseconds. The ids are kept in `config.student_init`.
    Shleifer & Rush (2020), "shrink and fine-tune".

    Raises InputError for another family, impossible depths or ids, or when weights are missing or left over.
    """
    if teacher.config.model_type not in FAMILIES:
        raise InputError(f"teacher is a {teacher.config.model_type} model: give one of {', '.join(FAMILIES)}")
    kept, config = {}, copy.deepcopy(teacher.config)
    config.student_init = {}
    names = {module: name for name, module in teacher.named_modules()}
    for stack, module, layers, ids in (
        ("encoder", teacher.get_encoder(), encoder_layers, encoder_layer_ids),
        ("decoder", teacher.get_decoder(), decoder_layers, decoder_layer_ids),
    ):
        depth = len(_layers(module))  # whatever the config says
        _check_depth(f"{stack}_layers", layers, depth)
        ids = check_layer_ids(f"{stack}_layer_ids", layer_map(depth, layers) if ids is None else ids, layers, depth)
        kept[names[_layers(module)]] = ids
        config.student_init |= {f"{stack}_layer_ids": ids, f"teacher_{stack}_layers": depth}
    set_depths(config, encoder_layers, decoder_layers)
    config._name_or_path = ""  # the student is not its teacher, and the teacher's may be a home path

    # A fresh model numbers its layers anew for the attention cache; slicing the teacher's lists would keep old numbers.
    # On the meta device it costs no memory and no initialization.
    with torch.device("meta"):
        student = type(teacher)(config)
    _copy_weights(student, teacher, kept, share_weights)
    student.generation_config = copy.deepcopy(teacher.generation_config)
    return student.eval(), *kept.values()


def _copy_weights(
    student: PreTrainedModel, teacher: PreTrainedModel, kept: dict[str, list[int]], share_weights: bool
) -> None:
    """Fill a student on the meta device; `kept` maps the name of a layer list to the teacher's layers it takes."""
    copies, state = {}, {}
    for name, weight in teacher.state_dict(keep_vars=True).items():
        stack = next((stack for stack in kept if name.startswith(f"{stack}.")), None)
        if stack and "relative_attention_bias" not in name:  # which T5 keeps in block 0 for all layers of a stack
            index, rest = name.removeprefix(f"{stack}.").split(".", 1)
            if int(index) not in kept[stack]:
                continue
            name = f"{stack}.{kept[stack].index(int(index))}.{rest}"
        if id(weight) not in copies:  # weights tied in the teacher, and only those, are one object in the student too:
            own = weight.detach()  # T5 v1.1 says "tied" in its config while its head is not
            own = own if share_weights else own.clone()
            copies[id(weight)] = nn.Parameter(own) if isinstance(weight, nn.Parameter) else own
        state[name] = copies[id(weight)]
    missing, left = student.load_state_dict(state, strict=False, assign=True)  # keeps who is trainable
    if missing or left:
        raise InputError(
            f"teacher and {student.config.model_type} student differ in weights, such as {[*missing, *left][0]}: "
            "load the teacher again from complete files of its family"
        )
    if share_weights:
        student.requires_grad_(False)  # training a view would train its teacher


def new_student(
    teacher: PreTrainedModel, encoder_depth: int, decoder_depth: int, width: int = 0, like: str = ""
) -> PreTrainedModel:
    """Return a randomly initialised student of the teacher's family and vocabulary, of another depth and width.

    `width` is that of the hidden states, 0 = the teacher's. Heads keep their size, so a narrower student has fewer, and
    its feed-forward layers shrink along. `like` names a model whose sizes it takes in place of the teacher's, so that
    teachers of several sizes get one student. Raises InputError for an impossible depth, a width that the number of
    heads or the feed-forward width cannot follow, and a model of another family.
    """
    _check_depth("encoder_layers", encoder_depth, len(encoder_layers(teacher)))
    _check_depth("decoder_layers", decoder_depth, len(decoder_layers(teacher)))
    config = sizes_of(teacher.config, like) if like else copy.deepcopy(teacher.config)
    config.student_init = None
    set_depths(config, encoder_depth, decoder_depth)
    full_width, width = config.d_model, width or config.d_model
    heads = config.num_attention_heads  # T5 maps it to its own name
    for name in SHRINKING:
        if hasattr(config, name):
            value, rest = divmod(getattr(config, name) * width, full_width)
            if rest or not value:
                raise InputError(
                    f"width {width} leaves no whole {name}: the teacher has {heads} heads on a width of "
                    f"{full_width}, give a multiple of {full_width // heads}"
                )
            setattr(config, name, value)
    config.d_model = width
    student = type(teacher)(config)
    if getattr(config, "scale_decoder_outputs", True) is False:
        # T5 v1.1 has a head of its own. The library ties it nonetheless, and its logits would be sqrt(width) too large.
        student.lm_head.weight = nn.Parameter(student.lm_head.weight.detach() * width**-0.5)
    student.generation_config = copy.deepcopy(teacher.generation_config)
    return student.eval()


def check_embeddings(source: str, teacher: str, width: int) -> None:
    """Raise InputError unless a student of this width can start from the token embeddings of the model `source`.

    A row belongs to a token id, so the tokenizer must be the teacher's, token by token. No weights are loaded.
    """
    if source != teacher:
        check_same_tokenizer(teacher, load_tokenizer(teacher), source, load_tokenizer(source))
    if width > (given := load_config(source).d_model):
        fix = 'name a model at least as wide, or "" for random embeddings'
        raise InputError(f"embeddings of {source} of width {given} cannot start a student of width {width}: {fix}")


@torch.no_grad()
def start_embeddings(student: PreTrainedModel, source: PreTrainedModel) -> None:
    """Give a student the token embeddings of another model, scaled to the size of its initial ones.

    A narrower student gets `project_embeddings` of them. `check_embeddings` tells whether the two fit.
    """
    given, own = (model.get_input_embeddings().weight for model in (source, student))
    rows = min(len(given), len(own))  # models of one tokenizer may be padded to different numbers of rows
    given = project_embeddings(given.detach().to(own), own.shape[1])[:rows]
    own[:rows] = given * (own.std() / given.std())


def project_embeddings(embeddings: Tensor, width: int) -> Tensor:
    """Return embeddings (rows, width) along the first principal directions: their products are the nearest possible."""
    if width == embeddings.shape[1]:
        return embeddings
    left, sizes, _ = torch.linalg.svd(embeddings, full_matrices=False)
    return left[:, :width] * sizes[:width]


def sizes_of(config: PreTrainedConfig, like: str) -> PreTrainedConfig:
    """Return the config of the model named `like` with the vocabulary and special tokens of the given one."""
    other = load_config(like)
    if other.model_type != config.model_type:
        raise InputError(f"{like} is a {other.model_type} model: name one of the teacher's family, {config.model_type}")
    for name, value in config.to_dict().items():
        if name == "vocab_size" or name.endswith("_token_id"):
            setattr(other, name, value)
    other.tie_word_embeddings = config.tie_word_embeddings
    other._name_or_path = ""
    return other


def set_depths(config: PreTrainedConfig, encoder_layers: int, decoder_layers: int) -> None:
    """Give a config other depths, so that models of it also generate."""
    if config.model_type == "t5":
        config.num_layers, config.num_decoder_layers = encoder_layers, decoder_layers
        size_t5_cache(config)
    else:
        config.encoder_layers, config.decoder_layers = encoder_layers, decoder_layers
        # LayerDrop may skip a whole one-layer decoder, and hidden states of skipped layers cannot be matched.
        config.encoder_layerdrop = config.decoder_layerdrop = 0.0


# ------------------------------------------------------------------------------------------------- parts of a model


def project(model: PreTrainedModel, decoder_hidden: Tensor) -> Tensor:
    """Return logits (..., vocab) of the decoder's last hidden states (..., dim), as the family's forward pass does."""
    if getattr(model.config, "scale_decoder_outputs", False):  # T5 v1.0 only; v1.1 has its own head instead
        decoder_hidden = decoder_hidden * model.config.d_model**-0.5
    logits = model.get_output_embeddings()(decoder_hidden)
    bias = getattr(model, "final_logits_bias", None)  # BART, mBART, Pegasus, Marian
    return logits if bias is None else logits + bias[0].to(logits.device)


def freeze(model: PreTrainedModel, encoder: bool = True, embeddings: bool = True) -> None:
    """Stop training the encoder, or token and position embeddings of both sides, or both, as Shleifer & Rush do.

    A head tied to the embeddings is frozen with them. Without `embeddings` a shared matrix stays trainable.
    """
    embedding = {id(weight) for weight in _embeddings(model)}
    parameters = [w for w in model.get_encoder().parameters() if id(w) not in embedding] if encoder else []
    for weight in [*parameters, *(_embeddings(model) if embeddings else [])]:
        weight.requires_grad_(False)


def has_teacher_encoder(student: PreTrainedModel, teacher: PreTrainedModel) -> bool:
    """Return whether one encoder pass serves both in training: the student's is frozen and equal to the teacher's."""
    frozen = not any(weight.requires_grad for weight in student.get_encoder().parameters())
    return frozen and encoders_equal(student, teacher)


def encoders_equal(student: PreTrainedModel, teacher: PreTrainedModel) -> bool:
    """Return whether both encoders have the same depth and, in the teacher's dtype, the same weights."""
    if type(student) is not type(teacher):
        return False
    ours, theirs = dict(student.get_encoder().named_parameters()), dict(teacher.get_encoder().named_parameters())
    return ours.keys() == theirs.keys() and all(
        weight.shape == theirs[name].shape
        and torch.equal(weight.to(theirs[name].device, theirs[name].dtype), theirs[name])
        for name, weight in ours.items()
    )


def count_parameters(model: PreTrainedModel) -> dict[str, int]:
    """Return the numbers of parameters: total, trainable, encoder, decoder, embeddings; the last three add up to total.

    Tied weights count once. Embeddings are those of tokens and positions on both sides, and an untied head.
    """
    outer = {id(weight) for weight in outer_weights(model)}
    counted = {
        "total": model.parameters(),
        "trainable": (weight for weight in model.parameters() if weight.requires_grad),
        "encoder": (weight for weight in model.get_encoder().parameters() if id(weight) not in outer),
        "decoder": (weight for weight in model.get_decoder().parameters() if id(weight) not in outer),
        "embeddings": (weight for weight in model.parameters() if id(weight) in outer),
    }
    return {name: sum(weight.numel() for weight in weights) for name, weights in counted.items()}


def outer_weights(model: PreTrainedModel) -> list[nn.Parameter]:
    """Return the weights outside of the layers: tables of tokens and positions, and the head; tied ones come once."""
    return list(dict.fromkeys([*_embeddings(model), *model.get_output_embeddings().parameters()]))


def _embeddings(model: PreTrainedModel) -> list[nn.Parameter]:
    stacks = (model.get_encoder(), model.get_decoder())
    modules = [getattr(stack, name, None) for stack in stacks for name in ("embed_tokens", "embed_positions")]
    return [weight for module in modules if module is not None for weight in module.parameters()]
