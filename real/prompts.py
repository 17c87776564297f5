"""Prompts made of a topic and one or two constraints, in three splits; the same ones for a seed.

    training    training topics, training kinds of constraint
    topics      held-out topics, training kinds
    kinds       held-out topics, held-out kinds of constraint, which no training prompt has

A topic is a task and words that answers to it tend to have. They are how a rule sees whether a
response is about the topic (real/rule.py), so they are many; the first ones are also the words that
a prompt asks for or forbids.
"""

import functools
from dataclasses import dataclass

import torch

from real import constraints
from real.constraints import KINDS, TOPIC, Constraint

TRAINING_TOPICS = """
Explain how bees make honey.
    nectar hive flower honey pollen comb worker wax sweet colony queen sugar bee insect enzyme
Describe a rainy day in a city.
    umbrella street wet puddle rain cloud drop people building grey sky window car sound traffic
Give advice on how to sleep better.
    bed night routine sleep relax room dark caffeine screen light quiet stress hour schedule
Tell me why the sky is blue.
    light scatter atmosphere sun sky blue wavelength air molecule color colour red particle
Describe your favorite breakfast.
    egg coffee toast bread breakfast morning fruit juice pancake bacon oatmeal milk butter delicious
Explain why exercise is good for you.
    heart muscle health exercise body weight energy mood stress disease strength stronger fitness
Write about a dog that finds a bone.
    bone dog dig garden yard tail buried bark owner happy paw nose chew ground found park
Explain how a bicycle works.
    pedal wheel chain gear bicycle bike handlebar brake ride rider frame balance tire turn
Describe a walk along the beach.
    sand wave ocean beach water sea shell sun shore foot feet salt breeze gull sunset
Give tips for learning a new language.
    practice vocabulary word language speak grammar listen native book conversation daily learn
Explain why the ocean is salty.
    river mineral rock salt ocean water sea land rain dissolve sodium chloride evaporate erosion
Write about a child's first day at school.
    teacher classroom friend school child backpack parent nervous desk class bus learn mother
Explain how to bake bread.
    flour yeast oven bread dough water salt knead bake rise loaf mix bowl hour
Describe a thunderstorm.
    lightning rain cloud thunder storm wind sky dark flash loud roar power electric
Tell me about the life of a butterfly.
    caterpillar egg wing butterfly flower cocoon chrysalis pupa leaf leaves adult nectar
Give reasons to read books every day.
    knowledge mind story read book imagination learn vocabulary stress brain world idea author
Explain how plants grow.
    water soil seed plant sun root leaf leaves light nutrient stem photosynthesis energy air
Write about an old lighthouse.
    sea ship light lighthouse keeper tower beam storm coast rock shore sailor wave guide
Describe a busy market.
    vendor fruit stall market people vegetable fresh smell crowd colorful price buyer food noise
Explain what money is for.
    buy pay goods money trade service save price exchange value bank currency worth economy
Give advice to a new driver.
    road speed car drive driver seat belt mirror signal traffic safe brake limit attention
Tell me about winter in the mountains.
    snow cold ski winter mountain ice peak tree white slope frozen wind cabin snowflake
Explain how a candle burns.
    wax wick flame candle heat burn oxygen melt light liquid vapor smoke fire carbon
Write about a cat who loves fish.
    bowl water tail cat fish whisker paw eat kitchen pond river owner swim tuna hungry
Describe how to plant a tree.
    hole soil root tree plant water dig ground shovel seed branch mulch sun shade
Explain why we have seasons.
    earth sun tilt season axis summer winter orbit spring autumn light hemisphere day year
Give tips for saving money.
    budget spend bank save money account expense income debt bill goal cost cheap interest
Tell me about the moon.
    earth night crater moon orbit light sky surface gravity lunar tide phase planet sun
Write about a robot that learns to paint.
    brush color canvas robot paint art artist picture machine create learn colour program
Explain how to make tea.
    water leaf cup tea boil hot steep kettle bag milk sugar pour flavor honey
Describe a quiet library.
    shelf book reader library quiet silence page desk chair read light whisper study room
Give advice on making new friends.
    kind listen smile friend people interest conversation club honest meet share talk group social
Explain how airplanes fly.
    wing lift engine air airplane plane pilot thrust drag speed gravity sky force pressure
Tell me why teamwork matters.
    goal together idea team teamwork member work share skill communicate success trust problem
Write about a garden in spring.
    flower tree bee garden spring bloom green rose tulip bird sun grass petal soil scent
Explain why we brush our teeth.
    cavity gum plaque teeth tooth brush bacteria mouth breath clean decay dentist food toothpaste
Describe a journey by train.
    window station seat train track passenger ticket landscape travel field village ride view
Give tips for taking good photos.
    light camera angle photo focus lens subject background picture shot frame composition natural
Tell me about elephants.
    trunk africa herd elephant tusk ear large big animal asia ivory mammal memory calf
Explain how to clean a kitchen.
    sink dish counter kitchen wipe clean floor soap water oven stove sponge trash surface
"""

HELD_OUT_TOPICS = """
Explain how volcanoes erupt.
    magma lava ash volcano erupt pressure gas rock earth crust mountain surface heat explode
Describe a night under the stars.
    moon sky fire star night dark camp constellation tent quiet bright galaxy air twinkle
Give advice on how to prepare for an exam.
    study note rest exam test plan schedule sleep practice review subject question learn
Tell me why trees lose their leaves.
    autumn winter water tree leaf leaves fall cold light branch chlorophyll energy green color
Write about a boy who builds a boat.
    wood river water boat boy sail hammer lake build father sea dream float nail
Explain how to cook rice.
    water pot lid rice cook boil heat salt minute stir grain simmer rinse cup
Describe a birthday party.
    cake candle gift birthday party friend balloon music present guest dance song family happy
Give tips for staying healthy at work.
    break water desk work walk stretch chair healthy lunch snack posture stress sleep exercise
Tell me about penguins.
    ice antarctica bird penguin swim fish cold feather egg water wing fly flipper ocean
Explain how a clock works.
    hand hour gear clock minute time second spring pendulum wheel battery tick mechanism dial
Write about a lost key.
    door pocket lock key lost search found house home drawer find open floor drop
Describe a small village in the hills.
    house road sheep village hill stone farm church people valley green field quiet tree
Explain why we need to drink water.
    body thirst blood water drink hydrate organ cell kidney sweat temperature health energy skin
Give advice on caring for a puppy.
    food vet walk puppy dog train play love toy water bed patient vaccine owner
Tell me about the sun.
    star heat light sun earth energy planet solar gas hydrogen hot system plasma helium
Write about a musician who plays in the street.
    guitar song crowd music musician street play violin coin melody people city note listen
Explain how snow forms.
    cloud ice crystal snow water cold freeze vapor temperature air flake fall droplet winter
Describe a day on a farm.
    cow field tractor farm farmer chicken milk barn animal crop morning harvest egg sheep
Give tips for a long car trip.
    music snack map car trip drive road water rest fuel gas stop pack break
Tell me why honesty is important.
    trust truth lie honest honesty relationship respect people friend integrity believe person
Write about a dragon that is afraid of fire.
    cave flame wing dragon fire fear knight afraid breath village brave scale smoke water
Explain how to wash a car.
    soap water sponge car wash bucket hose rinse dry towel wax dirt wheel clean
Describe a forest in autumn.
    leaf leaves tree forest autumn red orange golden yellow ground wind path color squirrel
Give advice on giving a speech.
    audience practice voice speech eye speak message confident story breath clear contact listen
"""

SPLITS = {
    "training": (TRAINING_TOPICS, constraints.TRAINING),
    "topics": (HELD_OUT_TOPICS, constraints.TRAINING),
    "kinds": (HELD_OUT_TOPICS, constraints.HELD_OUT),
}


@dataclass(frozen=True)
class Topic:
    task: str
    words: tuple[str, ...]


@functools.cache
def topics(text: str) -> dict[str, Topic]:
    """{task: topic}, in the order of the text: a line with the task, a line with its words."""
    lines = text.strip().splitlines()
    pairs = zip(lines[::2], lines[1::2], strict=True)
    return {task: Topic(task, tuple(line.split())) for task, line in pairs}


def topic_of(prompt: str) -> Topic:
    """The topic of a prompt, read from its text. ValueError for a prompt that is not of here."""
    found = topics(TRAINING_TOPICS) | topics(HELD_OUT_TOPICS)
    task = prompt[: prompt.find(".") + 1]
    if task not in found:
        raise ValueError(f"prompt {prompt[:40]!r} has none of the topics of real/prompts.py")
    return found[task]


# ------------------------------------------------------------------------ drawing


def pick(options, generator: torch.Generator):
    """One of the options, all equally likely."""
    return options[int(torch.randint(len(options), (1,), generator=generator))]


def shuffled(options, generator: torch.Generator) -> list:
    return [options[i] for i in torch.randperm(len(options), generator=generator).tolist()]


def fill(name: str, topic: Topic, generator: torch.Generator) -> Constraint:
    """A constraint of this kind, its blanks filled at random."""
    arguments = {}
    for blank, values in KINDS[name].values.items():
        # The first words of a topic are those that an answer to it can hardly do without.
        values = topic.words[:3] if values is TOPIC else values
        arguments[blank] = pick(values, generator)
    return Constraint(name, arguments)


def draw_prompts(split: str, count: int, seed: int) -> list[str]:
    """`count` different prompts of a split; all its kinds and topics take turns.

    Every fourth one has a second constraint, of another kind of the split that goes with the first.
    """
    text, kinds = SPLITS[split]
    generator = torch.Generator().manual_seed(seed)
    order = shuffled(list(topics(text).values()), generator)
    kinds = shuffled(kinds, generator)

    prompts = {}
    turn = 0
    while len(prompts) < count:
        topic = order[turn % len(order)]
        # With each pass over the topics a topic gets another kind, also if the numbers divide.
        name = kinds[(turn + turn // len(order)) % len(kinds)]
        chosen = [fill(name, topic, generator)]

        others = [other for other in kinds if not KINDS[other].takes & KINDS[name].takes]
        if turn % 4 == 3 and others:
            chosen.append(fill(pick(others, generator), topic, generator))
        prompt = " ".join([topic.task, *(constraint.text for constraint in chosen)])
        prompts[prompt] = None  # a set that keeps its order
        turn += 1
    return list(prompts)
