"""The Ancestry Trace Challenge: who is the eldest of a family whose relations are told out of order?

Four choices, four worked examples before them. The right one is the eldest; the others are the next three down the
chain. Each question is asked with its choices in the four circular orders.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from random import Random

from evals.needlebench.prompts import Example, Impossible
from evals.needlebench.spec import Language

LETTERS = "ABCD"
ORDERS = ("ABCD", "BCDA", "CDAB", "DABC")
ASKED: dict[Language, str] = {"en": "Question: ", "zh": "问题: "}
ANSWERED: dict[Language, str] = {"en": "Answer: ", "zh": "回答: "}
QUESTION: dict[Language, str] = {
    "en": "Given the scrambled family relationships described above, who is the eldest relative that {0}{1}{0} can "
    "trace back to in the context?",
    "zh": "在上面提供的打乱的家族关系文本中，{0}{1}{0}的能够向上追溯到的最年长的亲人是谁？",
}
RELATIONS: dict[Language, tuple[str, ...]] = {
    "en": (
        "father",
        "mother",
        "dad",
        "mom",
        "grandfather",
        "grandmother",
        "maternal grandmother",
        "maternal grandfather",
        "paternal grandfather",
        "paternal grandmother",
    ),
    "zh": ("父亲", "母亲", "爸爸", "妈妈", "爷爷", "奶奶", "姥姥", "姥爷", "外公", "外婆"),
}
SENTENCES: dict[Language, tuple[str, ...]] = {
    "en": (
        "{A} is {B}'s {relation}.",
        "{B}'s {relation} is {A}.",
        "{A}, as {B}'s {relation}, has a significant impact on {B}'s upbringing.",
        "{A} is not only {B}'s {relation} but also {B}'s role model.",
        "{B} is the child of {A}.",
        "For {B}, {A} is not just a {relation}, but also a friend.",
        "{A} plays the role of {B}'s {relation} in {B}'s life.",
        "{B} considers {A} as their {relation}.",
    ),
    "zh": (
        "{A}是{B}的{relation}。",
        "{B}的{relation}是{A}。",
        "{A}作为{B}的{relation}，对{B}的成长有重要影响。",
        "{A}不仅是{B}的{relation}，还是{B}的榜样。",
        "{B}是{A}所生的孩子。",
        "{A}对{B}来说，不只是一个{relation}，还是一个朋友。",
        "{A}在{B}的生命中扮演着{relation}的角色。",
        "{B}把{A}视为其{relation}。",
    ),
}
# Story, last person, choices and right letter of NeedleBench's own worked examples.
SHOTS: dict[Language, tuple[tuple[str, str, tuple[str, ...], str], ...]] = {
    "en": (
        (
            "Jasmine Lane plays the role of James Hill's father in James Hill's life.",
            "James Hill",
            ("Jasmine Lane", "James Hill", "Christopher Flores", "Paula Reeves"),
            "A",
        ),
        (
            "For Michael Goodwin, Annette Valdez is not just a dad, but also a friend."
            "For Annette Valdez, Mary Sanders is not just a father, but also a friend.",
            "Michael Goodwin",
            ("Michael Goodwin", "Annette Valdez", "Mary Sanders", "James Mitchell"),
            "C",
        ),
        (
            "Laura Garcia considers Mr. Stephen Valdez DDS as their mom."
            "Mr. Stephen Valdez DDS's maternal grandfather is Elizabeth Smith."
            "Laura Garcia is Ashley Johnson's mom.",
            "Ashley Johnson",
            ("Ashley Johnson", "Mr. Stephen Valdez DDS", "Laura Garcia", "Elizabeth Smith"),
            "D",
        ),
        (
            "Justin Sanchez's paternal grandfather is Laurie Bean."
            "For Laurie Bean, Christina Kim is not just a mother, but also a friend."
            "Jessica Bass, as Christina Kim's maternal grandfather, has a significant impact on Christina Kim's "
            "upbringing."
            "Sarah Hampton considers Justin Sanchez as their father.",
            "Sarah Hampton",
            ("Christina Kim", "Jessica Bass", "Laurie Bean", "Justin Sanchez"),
            "B",
        ),
    ),
    "zh": (
        ("毕东作为刘红的爸爸，对刘红的成长有重要影响。", "刘红", ("毕东", "刘红", "李清亮", "王展"), "A"),
        (
            "梅建平作为黄玉兰的姥姥，对黄玉兰的成长有重要影响。梅建平的妈妈是朱丽丽。蓝鑫把黄玉兰视为其母亲。"
            "焦慧不仅是朱丽丽的妈妈，还是朱丽丽的榜样。",
            "蓝鑫",
            ("梅建平", "朱丽丽", "蓝鑫", "焦慧"),
            "D",
        ),
        (
            "毕东把柳金凤视为其姥姥。奉兵作为柳金凤的妈妈，对柳金凤的成长有重要影响。余萍把杨颖视为其爸爸。"
            "毕东在郭建华的生命中扮演着父亲的角色。常宁的外公是余萍。刘慧是郭建华所生的孩子。"
            "刘慧在杨颖的生命中扮演着外公的角色。",
            "常宁",
            ("柳金凤", "毕东", "奉兵", "余萍"),
            "C",
        ),
        (
            "魏丽丽在谢平的生命中扮演着奶奶的角色。郭兵是魏阳的姥姥。谢平是郑玉珍的外婆。丁颖把武波视为其外公。"
            "丁颖在李建国的生命中扮演着外婆的角色。武波的父亲是刘瑜。许玲把余桂芳视为其父亲。刘瑜把许玲视为其爷爷。"
            "李建国对郭兵来说，不只是一个爷爷，还是一个朋友。魏丽丽的外公是魏阳。",
            "郑玉珍",
            ("魏丽丽", "刘瑜", "李建国", "余桂芳"),
            "D",
        ),
    ),
}
SHOT_QUOTES: dict[Language, str] = {"en": "'", "zh": '"'}


def ancestry_examples(names: Sequence[str], language: Language, people: int, repeats: int) -> list[Example]:
    """Four examples a repeat, one for each order of the choices. Raises `Impossible` where there are too few names."""
    if len(set(names)) < max(people, len(LETTERS)):
        raise Impossible(f"there are only {len(set(names))} names")
    return [example for repeat in range(repeats) for example in _question(names, language, people, Random(repeat))]


def _question(names: Sequence[str], language: Language, people: int, random: Random) -> list[Example]:
    family = random.sample(list(names), people)
    story = []
    for elder, younger in pairwise(family):
        sentence = random.choice(SENTENCES[language])
        story.append(sentence.format(A=elder, B=younger, relation=random.choice(RELATIONS[language])))
    # OpenCompass shuffles with an empty part at the end of the story, which takes part in the draw.
    story.append("")
    random.shuffle(story)
    choices = family[: len(LETTERS)]
    if len(choices) < len(LETTERS):
        strangers = [name for name in names if name not in family]
        choices += random.sample(strangers, len(LETTERS) - len(choices))
    text, shots = "".join(story), worked_examples(language)
    examples = []
    for order in ORDERS:
        listed = [choices[LETTERS.index(letter)] for letter in order]
        prompt = f"{shots}{ASKED[language]}{_ask(text, family[-1], listed, language, chr(39))}"
        examples.append(Example(prompt, (LETTERS[order.index(LETTERS[0])],)))
    return examples


def worked_examples(language: Language) -> str:
    """NeedleBench's four, each with its answer."""
    return "".join(
        f"{ASKED[language]}{_ask(story, last, choices, language, SHOT_QUOTES[language])}\n{ANSWERED[language]}{right}\n"
        for story, last, choices, right in SHOTS[language]
    )


def _ask(story: str, last: str, choices: Sequence[str], language: Language, quote: str) -> str:
    question = QUESTION[language].format(quote, last)
    options = "".join(f"{letter}. {choice}\n" for letter, choice in zip(LETTERS, choices, strict=True))
    return f"{story} \n{question}\n{options}"
