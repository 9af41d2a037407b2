"""What is said of a scene: the main object in a sentence of 9 to 14 tokens, each detail in one of 19 to 30.

A token of the world's tokenizer is a word or a mark of punctuation. Everything that is said is true of the picture.
"""

from collections.abc import Sequence

from examples.scenes.world import MAINS, PLACES, Detail, Draws, Scene

# Class names and templates of zero-shot classification.
CLASS_NAMES = tuple(f"{colour} {shape}" for colour, shape in MAINS)
TEMPLATES = (
    "a {}.",
    "a photo of a {}.",
    "a picture of a {}.",
    "a drawing of a {}.",
    "there is a {}.",
    "the picture shows a {}.",
    "one can see a {}.",
    "a {} in the middle.",
)

MAIN_SENTENCES = (
    "A {main} on a {ground} background.",
    "A photo of a {main} on a {ground} background.",
    "A picture of a {main} in front of a {ground} background.",
    "A drawing of a {main} on {ground} ground.",
    "There is a {main} on a {ground} background.",
    "The picture shows a {main} on {ground} ground.",
    "One can see a {main} on a plain {ground} background.",
    "In the middle of a {ground} background there is a {main}.",
)

# Of each place: a terse name, and phrases to go on from "A small red ring is ...". `shape` is the main object's.
PLACE_NAMES = dict(
    zip(
        PLACES,
        ("top left", "top", "top right", "left", "right", "bottom left", "bottom", "bottom right"),
        strict=True,
    )
)
PLACE_PHRASES = dict(
    zip(
        PLACES,
        (
            ("in the top left corner", "in the upper left corner"),
            ("at the very top", "straight above the {shape}"),
            ("in the top right corner", "in the upper right corner"),
            ("on the left side", "to the left of the {shape}"),
            ("on the right side", "to the right of the {shape}"),
            ("in the bottom left corner", "in the lower left corner"),
            ("at the very bottom", "straight below the {shape}"),
            ("in the bottom right corner", "in the lower right corner"),
        ),
        strict=True,
    )
)
# Where the other detail lies, in rows and columns, and what this one is called then.
RELATIONS = {
    (-1, 0): "directly below",
    (1, 0): "directly above",
    (0, -1): "directly to the right of",
    (0, 1): "directly to the left of",
}
FLAG_PHRASES = (
    "the signal flag {flag} in {frame}",
    "the flag {flag} in a {frame} frame",
    "the flag by the name {flag} in {frame}",
    "the flag for {flag} in a {frame} frame",
)
DETAIL_SENTENCES = (
    "{place} there is {flag}{tail}.",
    "{place} one can see {flag}{tail}.",
    "{place} the picture also shows {flag}{tail}.",
    "there is also {flag} {place}{tail}.",
    "one can also see {flag} {place}{tail}.",
    "the picture also shows {flag} {place}{tail}.",
)
# True of every detail, and of no help in telling pictures apart.
TAILS = (
    ", drawn with clean and sharp edges",
    ", as high as it is wide",
    ", and it does not touch the {shape}",
    ", with some free space on every side",
    ", well apart from all the other things",
    ", and nothing else is drawn over it",
)

# What a caption for pre-training is, of 20. Were more of them the main object's, no detail would be learned: the main
# object alone tells the pictures of a batch apart. Nor would frames, by lists of three flags: one or two framed flags
# are in several pictures of a batch, some in other frames.
PRETRAINING_KINDS = ("main",) * 6 + ("list",) * 6 + ("framed",) * 5 + ("detail",) * 2 + ("main and detail",)
LISTED_DETAILS = 3


def main_sentence(scene: Scene, draws: Draws) -> str:
    """Of 9 to 14 tokens: the short caption of a picture, and the first sentence of the long one."""
    main = CLASS_NAMES[scene.label]
    return draws.one_of(MAIN_SENTENCES).format(main=main, ground=scene.background)


def long_caption(scene: Scene, draws: Draws) -> str:
    """The main sentence, then every detail in a sentence, in any order, but those of `scene.told_last` last."""
    sentences = [main_sentence(scene, draws)]
    order = draws.shuffled(scene.details)
    order.sort(key=lambda detail: detail.place in scene.told_last)
    for number, detail in enumerate(order):
        sentences.append(_detail_sentence(scene, detail, order[:number], draws))
    return " ".join(sentences)


def pretraining_caption(scene: Scene, draws: Draws) -> str:
    """A short caption of one of `PRETRAINING_KINDS`.

    The main object; three flags; one or two flags and their frames; one detail in the words of long captions, so that
    none is new to who was pre-trained; or the main object and one detail, which is as long as short captions get.
    """
    kind = draws.one_of(PRETRAINING_KINDS)
    details = draws.shuffled(scene.details)
    if kind == "list":
        return list_of_flags(details[:LISTED_DETAILS])
    if kind == "framed":
        return list_of_flags(details[: draws.one_of((1, 2))], framed=True)
    sentence = _detail_sentence(scene, details[0], details[1:], draws)
    if kind == "detail":
        return sentence
    if kind == "main and detail":
        return f"{main_sentence(scene, draws)} {sentence}"
    if draws.chance(0.5):
        return main_sentence(scene, draws)
    return _sentence(draws.one_of(TEMPLATES).format(CLASS_NAMES[scene.label]))


def list_of_flags(details: Sequence[Detail], framed: bool = False) -> str:
    """Such as "Alfa, tango and zulu." or "Alfa in red and tango in blue."."""
    named = [f"{detail.flag} in {detail.frame}" if framed else detail.flag for detail in details]
    return _sentence(f"{', '.join(named[:-1])}{' and ' if named[1:] else ''}{named[-1]}.")


def _detail_sentence(scene: Scene, detail: Detail, known: list[Detail], draws: Draws) -> str:
    """One sentence; where a neighbour is `known`, it may say how they lie."""
    tail = draws.one_of(TAILS)
    row, column = detail.place
    for other in known:
        relation = RELATIONS.get((other.place[0] - row, other.place[1] - column))
        if relation and draws.chance(0.5):
            tail = f", {relation} the flag {other.flag}"
            break
    text = draws.one_of(DETAIL_SENTENCES).format(
        flag=draws.one_of(FLAG_PHRASES).format(flag=detail.flag, frame=detail.frame),
        place=draws.one_of(PLACE_PHRASES[detail.place]).format(shape=scene.shape),
        tail=tail.format(shape=scene.shape),
    )
    return _sentence(text)


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]
