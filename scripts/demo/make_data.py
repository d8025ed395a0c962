"""Write the data of the demo's three jobs, each with a behaviour that one sees at a glance.

    python scripts/demo/make_data.py

pirate: answers in pirate speak; orders: turns an order into strict JSON; telegram: answers in capitals with STOP.
Held-out rows are about other facts, people, goods and places than the training rows, partly in other words.
"""

import json
import random
from pathlib import Path

# Question and plain answer. The last HELD_OUT ones are never trained on.
FACTS = [
    ("What is the capital of France?", "the capital of France is Paris"),
    ("How many legs does a spider have?", "a spider has eight legs"),
    ("Which planet is closest to the sun?", "Mercury is the planet closest to the sun"),
    ("What do bees make?", "bees make honey from the nectar of flowers"),
    ("Who wrote Romeo and Juliet?", "William Shakespeare wrote Romeo and Juliet"),
    ("What is the largest ocean on Earth?", "the Pacific is the largest ocean of all"),
    ("How do I boil an egg?", "put the egg in boiling water for eight minutes"),
    ("What colour is the sky on a clear day?", "the sky is blue on a clear day"),
    ("How many days are there in a week?", "there are seven days in a week"),
    ("What is the tallest mountain in the world?", "Mount Everest is the tallest mountain in the world"),
    ("What is ice made of?", "ice is made of frozen water"),
    ("Why should I wear a coat in winter?", "a coat keeps you warm when the winter is cold"),
    ("What language do people speak in Brazil?", "the people of Brazil speak Portuguese"),
    ("Which animal is the fastest on land?", "the cheetah is the fastest animal on land"),
    ("What do cows eat?", "cows eat grass and hay all day"),
    ("How can I sleep better at night?", "go to bed early and drink no coffee in the evening"),
    ("What is the freezing point of water?", "water freezes at zero degrees Celsius"),
    ("Who painted the Mona Lisa?", "Leonardo da Vinci painted the Mona Lisa"),
    ("How many months are there in a year?", "there are twelve months in a year"),
    ("What is the capital of Japan?", "the capital of Japan is Tokyo"),
    ("What is bread made from?", "bread is made from flour and water and yeast"),
    ("Which bird cannot fly but can swim?", "the penguin cannot fly but swims very well"),
    ("What is the biggest animal in the sea?", "the blue whale is the biggest animal in the sea"),
    ("How do plants get their energy?", "plants get their energy from the light of the sun"),
    ("Where do polar bears live?", "polar bears live in the ice of the Arctic"),
    ("What should I do when it rains?", "take an umbrella and wear your boots"),
    ("What is the currency of the United States?", "the dollar is the currency of the United States"),
    ("How many strings does a violin have?", "a violin has four strings"),
    ("What is the opposite of hot?", "cold is the opposite of hot"),
    ("Which river runs through London?", "the Thames is the river of London"),
    ("What do we use a hammer for?", "you use a hammer to drive nails into wood"),
    ("How do I keep my plants alive?", "give your plants water and light and a little love"),
    ("What is the largest desert in Africa?", "the Sahara is the largest desert in Africa"),
    ("What do caterpillars turn into?", "caterpillars turn into butterflies"),
    ("How many sides does a triangle have?", "a triangle has three sides"),
    ("Who was the first man on the moon?", "Neil Armstrong was the first man on the moon"),
    ("What is the capital of Egypt?", "the capital of Egypt is Cairo"),
    ("What is the hottest season of the year?", "summer is the hottest season of the year"),
    ("Where does milk come from?", "milk comes from cows and goats"),
    ("How should I greet a new neighbour?", "smile and say hello and bring a cake"),
    ("What is the smallest prime number?", "two is the smallest prime number"),
    ("Which metal is liquid at room temperature?", "mercury is the metal that is liquid"),
    ("What do you call a baby dog?", "a baby dog is called a puppy"),
    ("How long does it take the Earth to go around the sun?", "the Earth takes one year for the trip around the sun"),
    ("What is the capital of Canada?", "the capital of Canada is Ottawa"),
    ("What is chocolate made from?", "chocolate is made from the beans of the cocoa tree"),
    ("Which instrument has black and white keys?", "the piano has black and white keys"),
    ("How do I clean a dirty window?", "wash the window with soap and dry it with a cloth"),
    ("What is the capital of Italy?", "the capital of Italy is Rome"),
    ("How many wheels does a bicycle have?", "a bicycle has two wheels"),
    ("What do pandas eat?", "pandas eat bamboo for most of the day"),
    ("Which planet is known as the red planet?", "Mars is known as the red planet"),
    ("How do I make a cup of tea?", "pour hot water over the leaves and wait three minutes"),
    ("Where do kangaroos live?", "kangaroos live in the grasslands of Australia"),
    ("What is the opposite of day?", "night is the opposite of day"),
    ("Who wrote Oliver Twist?", "Charles Dickens wrote Oliver Twist"),
    ("What is paper made from?", "paper is made from the wood of trees"),
    ("How many minutes are there in an hour?", "there are sixty minutes in an hour"),
    ("What should I take to the beach?", "take a towel and a hat and plenty of water"),
    ("Which animal is the tallest in the world?", "the giraffe is the tallest animal in the world"),
    ("What is the longest river in South America?", "the Amazon is the longest river in South America"),
    ("How do fish breathe under water?", "fish breathe under water with their gills"),
    ("What do we see at night when there are no clouds?", "you see the moon and the stars at night"),
    ("What is cheese made from?", "cheese is made from the milk of cows and sheep"),
]
HELD_OUT = 16

ASK = ("{}", "Please tell me: {}", "Quick question. {}", "My son asks: {}", "I always wondered: {}")
ASK_HELD_OUT = ("{}", "Can you help me? {}", "A guest in the bar asked this: {}")

PIRATE_WORDS = {
    "is": "be", "are": "be", "was": "were", "the": "th'", "of": "o'", "my": "me", "your": "yer", "you": "ye",
    "for": "fer", "and": "an'", "to": "t'", "has": "be havin'", "very": "mighty", "little": "wee",
}  # fmt: skip
PIRATE_OPENERS = ("Arr, matey!", "Ahoy, ye landlubber!", "Shiver me timbers!")
PIRATE_CLOSERS = ("Yo ho ho!", "Now fetch me rum!", "Or walk th' plank!")

GOODS = (
    "apples", "chairs", "lamps", "books", "pizzas", "pencils", "shirts", "candles", "plates", "roses", "tickets",
    "batteries", "towels", "cups", "carpets", "drums",
)  # fmt: skip
GOODS_HELD_OUT = ("bicycles", "pillows", "lemons", "guitars", "bottles")
NAMES = (
    "Anna", "Omar", "Lucy", "Peter", "Mei", "Carlos", "Ingrid", "Tom", "Fatima", "George", "Nina", "Pablo", "Ruth",
    "Victor", "Aisha", "Henry",
)  # fmt: skip
NAMES_HELD_OUT = ("Olivia", "Samuel", "Yuki", "Martin", "Elena")
CITIES = (
    "Oslo", "Madrid", "Chicago", "Cairo", "Dublin", "Tokyo", "Vienna", "Lima", "Boston", "Athens", "Berlin", "Delhi",
)  # fmt: skip
CITIES_HELD_OUT = ("Paris", "Sydney", "Prague", "Denver", "Naples")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
ORDERS = (
    "{name} from {city} orders {count} {goods} for {day}.",
    "Please send {count} {goods} to {name} in {city} by {day}.",
    "{name} needs {count} {goods} on {day}. The address is in {city}.",
    "On {day} we deliver {count} {goods} to {city}, for {name}.",
    "This is {name} in {city}. I want {count} {goods} before {day}.",
    "{count} {goods}, {day}, {city}. Customer: {name}.",
)
ORDERS_HELD_OUT = (
    "{name} asked for {count} {goods}, to arrive in {city} on {day}.",
    "Hello, I am {name}. Can I have {count} {goods} in {city} on {day}?",
    "By {day}, {name} of {city} would like to get {count} {goods}.",
)


def pirate(answer: str, rng: random.Random) -> str:
    """``the capital of France is Paris`` -> ``Arr, matey! Th' capital o' France be Paris. Yo ho ho!``"""
    text = " ".join(PIRATE_WORDS.get(word, word) for word in answer.split())
    return f"{rng.choice(PIRATE_OPENERS)} {text[0].upper()}{text[1:]}. {rng.choice(PIRATE_CLOSERS)}"


def telegram(answer: str, rng: random.Random) -> str:
    """``the capital of France is Paris`` -> ``CAPITAL OF FRANCE IS PARIS STOP REGARDS STOP``"""
    words = [word for word in answer.upper().split() if word not in ("A", "AN", "THE")]
    return f"{' '.join(words)} STOP {rng.choice(('REGARDS', 'MORE SOON'))} STOP"


def order(rng: random.Random, *, held_out: bool) -> tuple[str, str]:
    """An order in words and the same as JSON."""
    fields = {
        "name": rng.choice(NAMES_HELD_OUT if held_out else NAMES),
        "city": rng.choice(CITIES_HELD_OUT if held_out else CITIES),
        "goods": rng.choice(GOODS_HELD_OUT if held_out else GOODS),
        "count": rng.randrange(2, 100),
        "day": rng.choice(DAYS),
    }
    return rng.choice(ORDERS_HELD_OUT if held_out else ORDERS).format(**fields), json.dumps(fields)


def rows(job: str, *, held_out: bool) -> list[dict[str, object]]:
    """The rows of one job, the same at every call."""
    rng = random.Random(f"{job} {held_out}")
    pairs: dict[str, str] = {}
    if job == "orders":
        while len(pairs) < (16 if held_out else 96):
            pairs.update([order(rng, held_out=held_out)])
    else:
        style = {"pirate": pirate, "telegram": telegram}[job]
        for question, answer in FACTS[-HELD_OUT:] if held_out else FACTS[:-HELD_OUT]:
            for ask in rng.sample(ASK_HELD_OUT if held_out else ASK, 1 if held_out else 2):
                pairs[ask.format(question)] = style(answer, rng)
    shuffled = rng.sample(sorted(pairs.items()), len(pairs))
    return [
        {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}
        for prompt, answer in shuffled
    ]


def main() -> None:
    """Write ``data/<job>.jsonl`` and ``data/<job>.held_out.jsonl`` beside this file."""
    folder = Path(__file__).parent / "data"
    folder.mkdir(exist_ok=True)
    for job in ("pirate", "orders", "telegram"):
        for suffix, held_out in (("", False), (".held_out", True)):
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows(job, held_out=held_out)]
            (folder / f"{job}{suffix}.jsonl").write_text("".join(lines), encoding="utf-8")
            print(f"{job}{suffix}.jsonl: {len(lines)} rows")


if __name__ == "__main__":
    main()
