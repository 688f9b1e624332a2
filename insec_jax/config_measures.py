"""Names of what evaluate measures, as in results.json and in endpoints, with the words of the pages for each.

A rate is that of a metric for a source. A source is one of PLAIN and at most one of VARIANTS: the decoding.
"""

# Settings of the rivals (evaluation/rivals.py) that are in the names of their sources.
DRAWS = (1, 2, 5)  # of a step, at most: "redraw 1", "trigger 1"
BEAMS = (2, 4, 8)  # "beam 2"
BEST_REDRAW, BEST_MAJORITY = "best redraw", "best majority"  # at the best temperature
STATE, SWAPPED, PROBE = "state", "swapped", "linear probe"  # no whole solutions
WITHIN = 2  # delay, in steps, within which a flag counts for `detection_within`
PLAIN = {
  "injected": "Injected mistakes, greedy",
  "injected sampled": "Injected mistakes, sampled",
  "own": "Own mistakes, greedy",
  "own sampled": "Own mistakes, sampled",
  "solutions": "Whole solutions, greedy",
  "solutions sampled": "Whole solutions, sampled",
  SWAPPED: "Mistakes of another model, greedy",
}
RIVALS = {
  **{f"redraw {k}": f"low confidence redrawn, at most {k} draws, flags banned" for k in DRAWS},
  **{f"trigger {k}": f"flagged steps redrawn, at most {k} draws" for k in DRAWS},
  **{f"beam {width}": f"beam search of {width}, flags banned" for width in BEAMS},
  BEST_REDRAW: "low confidence redrawn, best temperature, flags banned",
  BEST_MAJORITY: "majority vote, best temperature, flags banned",
}
VARIANTS = {
  "flags banned": "flags banned",
  "at threshold": "flag bias from validation",
  "confidence": "flag forced by low confidence",
  "redraw": "low confidence redrawn, flags banned",
  "majority": "majority vote, flags banned",
  "larger": "sizes beyond training",
} | RIVALS
SOURCES = PLAIN | {
  f"{source}, {variant}": f"{title}, {words}" for source, title in PLAIN.items() for variant, words in VARIANTS.items()
}
SOURCES |= {
  STATE: "A step in place of an own mistake",
  PROBE: "Probe on hidden states, greedy",
  f"{PROBE} sampled": "Probe on hidden states, sampled",
}
# Of sources that begin with a wrong step, injected or own.
PROBE_METRICS = {
  "detection": ("Detection", "flag right after the wrong step"),
  "detection_within": ("Detection, or soon", f"at most {WITHIN} steps later"),
  "reason": ("Reason right", "of those flagged"),
  "correction": ("Correction given detection", "next step right, of those flagged"),
  "corrected": ("Detected and corrected", "next step right, of all probes"),
  "parroting": ("Parroting", "mistake repeated, of those flagged"),
  "parroting_failed": ("Parroting in failed fixes", "mistake repeated, of those"),
  "recovery": ("Recovery", "final answer right, of all probes"),
  "malformed": ("Malformed", "with a marker out of place"),
  "unverified_fix": ("Unverified fix", "not wrong, of those flagged"),
  "correction, forced": ("Correction, flag forced", "next step right"),
  "parroting, forced": ("Parroting, flag forced", "mistake repeated"),
  "recovery, forced": ("Recovery, flag forced", "final answer right"),
  "auroc": ("AUROC of p(flag)", "wrong over right; n pairs"),
  "auroc, confidence": ("AUROC of low confidence", "wrong over right; n pairs"),
  "auroc, linear probe": ("AUROC of a linear probe", "wrong over right; n pairs"),
}
# Of the source STATE.
STATE_METRICS = {
  "fresh_draw": ("Fresh draw right", "at temperature 1"),
  "second_choice": ("Next best step right", "the likeliest but the mistake"),
  "fresh_draw, flagged": ("Fresh draw right, mistake flagged", "at temperature 1"),
  "second_choice, flagged": ("Next best step right, mistake flagged", "the likeliest but the mistake"),
}
# Of whole solutions.
SOLUTION_METRICS = {
  "accuracy_t1": ("Acc@t1", "first attempts kept"),
  "accuracy_t2": ("Acc@t2", "after corrections"),
  "accuracy_strict": ("Acc@t2, strict", "no wrong step stands"),
  "wrong_to_right": ("Wrong → right", "of solutions"),
  "right_to_wrong": ("Right → wrong", "of solutions"),
  "false_alarms": ("False alarms per right step", "flagged, of right steps"),
  "false_alarm_solutions": ("False alarms per solution", "solutions with at least one"),
  "precision": ("Precision of the flag", "wrong, of flagged steps"),
  "harmful_edits": ("Harmful edits", "made wrong, of right steps"),
  "wrong_steps": ("Wrong steps", "of right and wrong steps"),
  "unverified_steps": ("Unverified steps", "not wrong, of all steps"),
  "own_mistakes": ("With a wrong step", "of solutions"),
  "answered": ("Answered", "of solutions"),
  "malformed": PROBE_METRICS["malformed"],
}
METRICS = PROBE_METRICS | STATE_METRICS | SOLUTION_METRICS
# Points of the learning curve, in metrics.jsonl: right answers of CURVE_PROBLEMS problems, greedy.
CURVE = {"curve/accuracy": "flags unconstrained", "curve/accuracy_banned": "flags banned"}
CURVE_PROBLEMS = "curve/problems"
MOST_CURVE_PROBLEMS = 100  # of a point; fewer with a smaller evaluate.num_problems
