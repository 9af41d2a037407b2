"""What is said of a scene: the main object in a sentence of 9 to 14 tokens, each detail in one of 19 to 30.

A token of the world's tokenizer is a word or a mark of punctuation. Everything that is said is true of the picture.
"""

from examples.scenes.world import MAINS, PLACES, Detail, Draws, Scene

# Class names and templates of zero-shot classification.
CLASS_NAMES = tuple(f"large {colour} {shape}" for colour, shape in MAINS)
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
            ("at the very top", "straight above the large {shape}"),
            ("in the top right corner", "in the upper right corner"),
            ("on the left side", "to the left of the large {shape}"),
            ("on the right side", "to the right of the large {shape}"),
            ("in the bottom left corner", "in the lower left corner"),
            ("at the very bottom", "straight below the large {shape}"),
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
OBJECTS = (
    "a {size} {texture} {colour} {shape}",
    "a {size} {colour} {shape} with a {texture} surface",
    "a {colour} {shape} that is {size} and {texture}",
    "a {size} {texture} {shape} in {colour}",
)
DETAIL_SENTENCES = (
    "{place} there is {object}{tail}.",
    "{place} one can see {object}{tail}.",
    "{place} the picture also shows {object}{tail}.",
    "there is also {object} {place}{tail}.",
    "one can also see {object} {place}{tail}.",
    "the picture also shows {object} {place}{tail}.",
)
# True of every detail, and of no help in telling pictures apart.
TAILS = (
    ", drawn with clean and sharp edges",
    ", much smaller than the large {shape} in the middle",
    ", and it does not touch the large {shape}",
    ", with some free space on every side",
    ", well apart from all the other things",
    ", and nothing else is drawn over it",
)

# What a caption for pre-training is, of 20. Were more of them the main object's, no detail would be learned: the main
# object alone tells the pictures of a batch apart.
PRETRAINING_KINDS = ("main",) * 5 + ("list",) * 11 + ("detail",) * 2 + ("main and detail",) * 2
LISTED_DETAILS = 3
SAID_OF_LISTED = 0.25  # how often a list names a size, a texture, and all its places


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

    The main object; three details and not the main object; one detail in the words of long captions, so that none is
    new to who was pre-trained; or the main object and one detail, which is as long as short captions get.
    """
    kind = draws.one_of(PRETRAINING_KINDS)
    details = draws.shuffled(scene.details)
    if kind == "list":
        return _list_of_details(details[:LISTED_DETAILS], draws)
    sentence = _detail_sentence(scene, details[0], details[1:], draws)
    if kind == "detail":
        return sentence
    if kind == "main and detail":
        return f"{main_sentence(scene, draws)} {sentence}"
    if draws.chance(0.5):
        return main_sentence(scene, draws)
    return _sentence(draws.one_of(TEMPLATES).format(CLASS_NAMES[scene.label]))


def _list_of_details(details: list[Detail], draws: Draws) -> str:
    """Of each detail its colour and shape; size, texture and place are named now and then, place of all or none."""
    with_places = draws.chance(SAID_OF_LISTED)
    named = []
    for detail in details:
        texture = f"{detail.texture} " if draws.chance(SAID_OF_LISTED) else ""
        size = f"{detail.size} " if draws.chance(SAID_OF_LISTED) else ""
        place = f" {PLACE_NAMES[detail.place]}" if with_places else ""
        named.append(f"a {size}{texture}{detail.colour} {detail.shape}{place}")
    return _sentence(f"{', '.join(named[:-1])} and {named[-1]}.")


def _detail_sentence(scene: Scene, detail: Detail, known: list[Detail], draws: Draws) -> str:
    """One sentence; where a neighbour is `known`, it may say how they lie, and names the neighbour unmistakably."""
    tail = draws.one_of(TAILS)
    names = [(other.size, other.colour, other.shape) for other in scene.details]
    row, column = detail.place
    for other in known:
        relation = RELATIONS.get((other.place[0] - row, other.place[1] - column))
        name = (other.size, other.colour, other.shape)
        if relation and names.count(name) == 1 and draws.chance(0.5):
            tail = f", {relation} the {' '.join(name)}"
            break
    text = draws.one_of(DETAIL_SENTENCES).format(
        object=draws.one_of(OBJECTS).format(
            size=detail.size, texture=detail.texture, colour=detail.colour, shape=detail.shape
        ),
        place=draws.one_of(PLACE_PHRASES[detail.place]).format(shape=scene.shape),
        tail=tail.format(shape=scene.shape),
    )
    return _sentence(text)


def _sentence(text: str) -> str:
    text = text.replace("a orange", "an orange")
    return text[0].upper() + text[1:]
