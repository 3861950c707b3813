"""The demo's little language: its words by category, the sentences made from them, and a word-level tokenizer.

In a sentence, `{city}` stands for the fact of that category and `{city2}` for a distractor: a value of the same
category that the post mentions and that is not the answer. `{he}` and `{his}` are pronouns of the post's main person.
"""

import re
from dataclasses import dataclass

from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import Metaspace as MetaspaceDecoder
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Metaspace, Punctuation, Sequence
from transformers import PreTrainedTokenizerFast

CUE = "\nTL;DR:"
WOMEN = ["Anna", "Mia", "Sara", "Nora", "Lea", "Ida", "Eva", "Maya", "Ruth", "Clara", "Julia", "Helen", "Rosa", "Amina"]
MEN = ["Omar", "Tom", "Paul", "Max", "Leo", "Ben", "Hugo", "Ivan", "Carl", "Noah", "Felix", "Adam", "Oscar", "Samir"]
CATEGORIES = {
    "name": WOMEN + MEN,
    "city": (
        "Oslo Rome Paris London Berlin Madrid Vienna Prague Dublin Lisbon Athens Cairo Tokyo Boston Lima "
        "Delhi Turin Geneva"
    ).split(),
    "item": "bike piano table lamp sofa guitar tent boat camera phone desk chair mirror clock carpet kettle".split(),
    "colour": "red blue green black white yellow pink brown grey purple".split(),
    "animal": "cat dog rabbit parrot pony duck goat hamster".split(),
    "place": "park station school library bakery harbour market church museum bridge".split(),
    "day": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split(),
    "month": "January February March April May June July August September October November December".split(),
    "vehicle": "train bus plane ferry coach taxi".split(),
    "job": "nurse teacher baker lawyer pilot driver painter manager cook gardener dentist writer".split(),
    "number": "5 6 7 8 9 10 12 14 15 20 25 30 35 38 40 41 45 50 55 60 65 70 75 80 85 90 95".split(),
}


@dataclass(frozen=True)
class Family:
    """One kind of post.

    Args:
        facts: The categories whose values a summary must get right.
        numbers: The least and the greatest number that makes sense.
        opening: Alternative first sentences.
        body: For each further sentence its alternatives; their order is free.
        summaries: Alternative surface forms of the summary, all with the same facts.
    """

    facts: tuple[str, ...]
    numbers: tuple[int, int]
    opening: tuple[str, ...]
    body: tuple[tuple[str, ...], ...]
    summaries: tuple[str, ...]


FAMILIES = (
    Family(
        facts=("name", "city", "colour", "item", "number"),
        numbers=(20, 95),
        opening=(
            "{name} lives in {city}.",
            "{name} has moved from {city2} to {city}.",
            "{name2} from {city2} told me about {name}, who lives in {city}.",
        ),
        body=(
            (
                "{He} wanted to sell {his} {colour} {item} and keep the {colour2} {item2}.",
                "There was a {colour2} {item2}, but the {colour} {item} had to go.",
                "The {colour} {item} was for sale, the {colour2} {item2} was not.",
            ),
            (
                "{He} asked for {number2} dollars but took {number} dollars.",
                "{name2} offered {number2} dollars, but {he} got {number} dollars in the end.",
                "The price was {number} dollars, not {number2} dollars as {he} had hoped.",
            ),
        ),
        summaries=(
            " {name} from {city} sold a {colour} {item} for {number} dollars.",
            " In {city}, {name} sold a {colour} {item} for {number} dollars.",
            " {name} got {number} dollars for a {colour} {item} in {city}.",
        ),
    ),
    Family(
        facts=("name", "month", "city", "vehicle", "number"),
        numbers=(5, 25),
        opening=(
            "{name} had a holiday in {month}, not in {month2}.",
            "{name} wanted to travel in {month2} but could only leave in {month}.",
            "{name2} always travels in {month2}, but {name} left in {month}.",
        ),
        body=(
            (
                "{He} dreamed of {city2}, but it was full, so {he} went to {city}.",
                "{name2} went to {city2}, while {name} chose {city}.",
                "{He} saw {city} and not {city2}, which was too far.",
            ),
            (
                "The {vehicle2} was late, so {he} took the {vehicle}.",
                "{He} went by {vehicle}, because the {vehicle2} cost too much.",
            ),
            (
                "{He} planned {number2} days but stayed for {number} days.",
                "After {number} days {he} was home, though {he} had paid for {number2} days.",
            ),
        ),
        summaries=(
            " {name} went to {city} by {vehicle} in {month} for {number} days.",
            " In {month}, {name} took the {vehicle} to {city} for {number} days.",
            " {name} spent {number} days in {city} in {month} and went by {vehicle}.",
        ),
    ),
    Family(
        facts=("name", "job", "city", "number"),
        numbers=(30, 95),
        opening=(
            "{name} has an offer to work as a {job}.",
            "{name} was a {job2} and may now become a {job}.",
            "{name2} is a {job2}, but the offer for {name} is to be a {job}.",
        ),
        body=(
            (
                "{He} hoped for {number2} thousand a year, but they pay {number} thousand.",
                "They first said {number2} thousand and then wrote {number} thousand.",
                "The pay is {number} thousand, though others get {number2} thousand.",
            ),
            (
                "The office is in {city}, far from {city2}.",
                "{He} would have to leave {city2} for {city}.",
            ),
        ),
        summaries=(
            " {name} has an offer as a {job} in {city} for {number} thousand.",
            " A job in {city} as a {job} would pay {name} {number} thousand.",
            " They offered {name} {number} thousand to be a {job} in {city}.",
        ),
    ),
    Family(
        facts=("name", "colour", "animal", "place", "day"),
        numbers=(5, 95),
        opening=(
            "{name} has a {colour} {animal}, and {name2} has a {colour2} {animal2}.",
            "{name} has a {colour2} {animal2}, but the {colour} {animal} ran away.",
        ),
        body=(
            (
                "{His} {animal} was lost on {day2} and came back on {day}.",
                "From {day2} until {day} the {animal} was gone.",
            ),
            (
                "{He} looked at the {place2}, but it was at the {place}.",
                "{name2} went to the {place2}, while {he} found it at the {place}.",
            ),
        ),
        summaries=(
            " {name} lost a {colour} {animal} and found it at the {place} on {day}.",
            " On {day}, {name} found a {colour} {animal} at the {place}.",
            " The {colour} {animal} of {name} was found on {day} at the {place}.",
        ),
    ),
)
FILLERS = (
    "It rained all week.",
    "It was a long story.",
    "{name2} came by for tea.",
    "{His} sister made a cake.",
    "What would you do?",
    "I hope this helps.",
    "The weather in {city2} was bad.",
)


def split_words(text: str) -> list[str]:
    """Cuts text into words and punctuation marks, exactly as the tokenizer does."""
    return re.findall(r"\w+|[^\w\s]", text)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Makes the word-level tokenizer of the demo's language.

    Returns:
        A fast tokenizer; <unk>, <pad>, <bos> and <eos> have the ids 0 to 3 and none is added on its own.
    """
    sentences = [*FILLERS]
    for family in FAMILIES:
        sentences += [*family.opening, *family.summaries, *(form for forms in family.body for form in forms)]
    written = {word for form in sentences for word in split_words(re.sub(r"\{\w+\}", "", form))}
    words = written | {word for words in CATEGORIES.values() for word in words}
    words |= {"She", "she", "Her", "her", "He", "he", "His", "his"}
    special = ["<unk>", "<pad>", "<bos>", "<eos>"]
    tokens = special + [CUE] + [f"▁{word}" if word.isalnum() else word for word in sorted(words)]
    tokenizer = Tokenizer(WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Sequence([Metaspace(), Punctuation()])
    tokenizer.decoder = MetaspaceDecoder()
    tokenizer.add_tokens([AddedToken(CUE, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
    )
