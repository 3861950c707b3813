"""The words of the language, and the values of its facts.

Every value takes several tokens (first and last name, color and thing, three digits), so right and wrong values may
share a beginning.
"""

WOMEN = "Anna Mia Sara Nora Lea Ida Eva Maya Ruth Clara Julia Helen".split()
MEN = "Omar Tom Paul Max Leo Ben Hugo Ivan Carl Noah Felix Adam".split()
LAST_NAMES = "Berg Holt Lund Moss Reed Vale Stone Frost Marsh Wood Lake Hart Bell Cole Dunn Ford".split()
VERBS = "sold bought rented fixed painted cleaned borrowed built".split()
COLOURS = "red blue green black white yellow brown grey".split()
THINGS = "bike piano table lamp sofa guitar tent boat camera phone desk chair mirror clock carpet kettle".split()
AREAS = "North South East West Old New".split()
SPOTS = "Harbour Market Mill Bridge Park Station School Church Museum Square".split()
MONTHS = "January February March April May June July August September October November December".split()
DAYS = range(10, 29)
AMOUNTS = range(110, 990, 5)

# Optional words that only change the length: adverbs, words before prices, ends of sentences.
ADVERBS = "finally quickly gladly quietly suddenly simply kindly proudly calmly bravely slowly happily".split()
PRICE_WORDS = "just only about some nearly exactly roughly almost around barely".split()
TAILS = ("in the end", "after all", "at last", "of all things", "this time", "once more", "for now", "as planned")
