"""GenEval: detections judged by its rules."""
