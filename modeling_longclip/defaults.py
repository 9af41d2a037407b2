"""The paper's numbers (arXiv 2403.15378, section 3.2). They stand here and nowhere else, with no imports."""

KEEP = 20  # leading rows of CLIP's table that are well trained, and stay
RATIO = 4  # each later row becomes this many
CLIP_LENGTH = 77  # rows of CLIP's own table
LENGTH = KEEP + RATIO * (CLIP_LENGTH - KEEP)  # 248
