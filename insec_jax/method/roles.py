"""Roles of tokens: the data gives each token its role, the config gives each role its weight."""

PROMPT, TEXT, MISTAKE, FLAG, REASON, CORRECTION = range(6)
NAMES = ("prompt", "text", "mistake", "flag", "reason", "correction")
# On pages: the colour-blind-safe palette of Okabe and Ito; text has none.
COLOURS = ("#999999", "", "#D55E00", "#E69F00", "#CC79A7", "#009E73")
NUM_ROLES = len(NAMES)
NO_ROLE = -1  # padding: counted nowhere
NO_NEGATIVE = -1  # of tokens: no correction begins to repeat its mistake here
