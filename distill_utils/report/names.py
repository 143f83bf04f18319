"""Names and colours of methods, the same in figures, tables and the index; without matplotlib, which loads slowly."""

# Okabe and Ito's colours, distinct with every common colour blindness; yellow is left out, too pale on white.
METHOD_COLORS = {
    "teacher": "#6b6b6b",
    "sft": "#0072b2",
    "kd": "#d55e00",
    "pl": "#009e73",
    "pl_kl": "#cc79a7",
    "pl_gold": "#00604a",
    "on_policy": "#a6761d",
    "kd_cached": "#8c3a00",
    "miniend": "#56b4e9",
    "reference": "#1c2127",
}
# Paths of task-agnostic distillation (miniend.PATHS), in no figure with the objectives above.
PATH_COLORS = {
    "scratch": "#8b949e",
    "logits": "#d55e00",
    "encoder": "#009e73",
    "decoder": "#cc79a7",
    "self": "#e69f00",
    "decoder_cross": "#a6761d",
    "miniend_logits": "#0072b2",
    "hidden": "#00604a",
    "none": "#1c2127",
}
BASELINE_COLOR = "#8b949e"
METHOD_LABELS = {"sft": "SFT", "kd": "KD", "pl": "PL", "pl_kl": "PL+KL", "pl_gold": "PL+references",
                 "on_policy": "on-policy KD", "kd_cached": "cached KD", "miniend": "MiniEnD",
                 "miniend_logits": "MiniEnD + logits"}  # fmt: skip


def method_color(method: str) -> str:
    """Return the colour of a method or path in every figure; what is neither is a light grey baseline."""
    return (METHOD_COLORS | PATH_COLORS).get(method, BASELINE_COLOR)


def method_label(method: str, student: str | None = None) -> str:
    """Return the printed name of a method, with the student's shape."""
    name = METHOD_LABELS.get(method, str(method).replace("_", " "))
    return f"{name} {student}" if student else name
