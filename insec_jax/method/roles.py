"""Roles of tokens: the data gives each token its role, the config (section `loss`) gives each role its weight.

prompt      the question, and a chat template
text        right steps of the answer, and the end of the text
mistake     a wrong step; by default of weight 0, but attended to
flag        a marker: the flag (the step before it is wrong) or the fix (the correction follows); or a confidence token
            (how sure the model was of the step before it)
reason      what is wrong, between flag and fix
correction  the step in place of the mistake
"""

PROMPT, TEXT, MISTAKE, FLAG, REASON, CORRECTION = range(6)
NAMES = ("prompt", "text", "mistake", "flag", "reason", "correction")
# On pages: the colour-blind-safe palette of Okabe and Ito; text has none.
COLOURS = ("#999999", "", "#D55E00", "#E69F00", "#CC79A7", "#009E73")
NUM_ROLES = len(NAMES)
NO_ROLE = -1  # padding: counted nowhere
NO_NEGATIVE = -1  # no negative here; a negative is a token to avoid in place of the target (data/negatives.py)
