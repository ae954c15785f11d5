"""A double-blind survey of people: replies of several methods side by side, votes that are never lost, what they say.

    form       the survey as a value: questions, answers by method, checks, rules; built from generations
    ballot     what one rater sees, and in which order
    records    raters and answers in SQLite; an answer is on disk before its receipt
    app        the pages
    votes      from records to votes: who is left out, and why
    results    win rates, differences, agreement, checks
    page       the results as one HTML page

A rater never learns which method wrote an answer, and neither does who watches the survey: method names are in the
survey's file and in the results, nowhere between.
"""

from coala.survey.ballot import Item, ballot
from coala.survey.form import Check, Survey, SurveyPrompt, SurveyQuestion, build, load_survey, save_survey
from coala.survey.records import Records
from coala.survey.results import Results, analyse
from coala.survey.votes import Votes, read_votes

__all__ = [
    "Check",
    "Item",
    "Records",
    "Results",
    "Survey",
    "SurveyPrompt",
    "SurveyQuestion",
    "Votes",
    "analyse",
    "ballot",
    "build",
    "load_survey",
    "read_votes",
    "save_survey",
]
