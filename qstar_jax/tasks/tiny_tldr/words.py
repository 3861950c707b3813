"""The words of the little language, and the values that its facts can have.

Every value is more than one token: a first and a last name, a colour and a thing, an amount of three digits. So values
of a post and wrong ones can begin alike.
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

# Words that change nothing but the length: how something was done, how a price is put, how a sentence ends.
ADVERBS = "finally quickly gladly quietly suddenly simply kindly proudly calmly bravely slowly happily".split()
PRICE_WORDS = "just only about some nearly exactly roughly almost around barely".split()
TAILS = ("in the end", "after all", "at last", "of all things", "this time", "once more", "for now", "as planned")
