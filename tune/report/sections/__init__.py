"""The parts of a report on one model: verdict, scores, comparisons, search, attacks, cost and the others."""
