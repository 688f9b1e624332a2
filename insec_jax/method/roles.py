"""Roles: what a token is. Data says the role, the config says what a role is worth."""

PROMPT, TEXT, MISTAKE, FLAG, REASON, CORRECTION = range(6)
NAMES = ("prompt", "text", "mistake", "flag", "reason", "correction")
# On pages: Okabe and Ito's, which colour-blind eyes tell apart; text has none.
COLOURS = ("#999999", "", "#D55E00", "#E69F00", "#CC79A7", "#009E73")
NUM_ROLES = len(NAMES)
NO_ROLE = -1  # padding: counted nowhere
NO_NEGATIVE = -1  # of tokens: no correction begins to repeat its mistake here
