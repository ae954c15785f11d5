"""Estimates with their intervals, agreement of raters, and one logistic regression: arrays in, numbers out.

    intervals     shares, means and bootstraps of rows, where rows of one group are not independent
    anytime       confidence sequences, which hold however often one looks
    scores        ranking accuracy, calibration and perplexity from scores
    votes         options that compete for one vote: differences, many tests, how many voters
    agreement     how far raters agree beyond chance
    logistic      logistic regression

Knows nothing of models, judges, pairs or files.
"""
