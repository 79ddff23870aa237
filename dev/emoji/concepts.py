"""Name what the model can draw: concepts and their icons, artwork, colours, styles, grounds. No imports, no side effects."""

# Set of artwork -> npm package and version; NOTICE.md has authors and licences.
PACKAGES = {
    "flat": ("@iconify-json/fluent-emoji-flat", "1.2.6"),
    "glossy": ("@iconify-json/fluent-emoji", "1.2.7"),
    "cartoon": ("@iconify-json/noto", "1.2.9"),
    "sticker": ("@iconify-json/twemoji", "1.2.5"),
    "ink": ("@iconify-json/fluent-emoji-high-contrast", "1.2.6"),
}
LICENCES = ("MIT", "Apache-2.0", "CC-BY-4.0")  # what the sets may be under; a share-alike set would bind the model too

# Concept -> icons; most are in every set.
ANIMALS = {
    "cat": "cat-face cat black-cat",
    "dog": "dog-face dog poodle service-dog",
    "bird": "bird dove eagle parrot black-bird",
    "bear": "bear polar-bear panda",
    "lion": "lion",
    "horse": "horse-face horse",
    "elephant": "elephant",
    "monkey": "monkey-face monkey",
    "frog": "frog",
    "turtle": "turtle",
    "rabbit": "rabbit-face rabbit",
    "mouse": "mouse-face mouse",
}
OBJECTS = {
    "backpack": "backpack",
    "glasses": "glasses sunglasses",
    "crown": "crown",
    "suitcase": "luggage briefcase",
    "chair": "chair",
    "balloon": "balloon",
    "bow": "ribbon",
    "car": "automobile oncoming-automobile sport-utility-vehicle taxi",
    "bowl": "steaming-bowl bowl-with-spoon green-salad",
    "clock": "alarm-clock mantelpiece-clock ten-oclock",
    "apple": "red-apple green-apple",
    "umbrella": "umbrella umbrella-with-rain-drops",
    "key": "key old-key",
    "hat": "top-hat womans-hat billed-cap",
    "cup": "hot-beverage teacup-without-handle",
    "guitar": "guitar",
}
CONCEPTS = [*ANIMALS, *OBJECTS]
LEFT_OUT = ("service-dog",)  # in the atlas, but harness and leash confuse
# Only the judge sees them, beneath the scene.
OTHERS = (
    "fox-face fox pig-face cow-face tiger-face koala fish whale octopus penguin snail butterfly house deciduous-tree rose "
    "mushroom rocket sailboat banana strawberry birthday-cake bell drum trumpet bicycle train locomotive airplane star "
    "red-heart soccer-ball hammer book open-book light-bulb telephone camera scissors gem-stone ghost robot cloud"
).split()

# Dark, middle and light stop of the ramp that a coloured object is painted with, RGB in 0..1.
COLOURS = {
    "red": ((0.36, 0.02, 0.05), (0.88, 0.12, 0.14), (1.0, 0.66, 0.62)),
    "orange": ((0.48, 0.18, 0.02), (0.99, 0.52, 0.06), (1.0, 0.83, 0.58)),
    "yellow": ((0.52, 0.34, 0.02), (0.99, 0.85, 0.13), (1.0, 0.96, 0.70)),
    "green": ((0.04, 0.26, 0.10), (0.18, 0.68, 0.26), (0.70, 0.93, 0.66)),
    "blue": ((0.04, 0.10, 0.40), (0.16, 0.40, 0.93), (0.66, 0.83, 1.0)),
    "purple": ((0.20, 0.05, 0.34), (0.55, 0.23, 0.80), (0.85, 0.70, 0.97)),
    "pink": ((0.55, 0.12, 0.32), (0.99, 0.50, 0.73), (1.0, 0.84, 0.91)),
    "brown": ((0.18, 0.09, 0.04), (0.50, 0.30, 0.16), (0.80, 0.63, 0.46)),
    "black": ((0.01, 0.01, 0.02), (0.13, 0.13, 0.15), (0.48, 0.48, 0.53)),
    "white": ((0.50, 0.52, 0.57), (0.95, 0.95, 0.97), (1.0, 1.0, 1.0)),
    "gray": ((0.20, 0.20, 0.22), (0.54, 0.55, 0.57), (0.84, 0.85, 0.87)),
}

# Style -> its share of the scenes; most captions name none, and then the artwork may be of any coloured set.
STYLES = {"": 0.60, "flat": 0.06, "glossy": 0.06, "cartoon": 0.06, "sticker": 0.06, "ink": 0.06, "neon": 0.05, "pixel": 0.05}
# Ground -> its share. The first five have a colour of their own, the others are places.
GROUNDS = {
    "plain": 0.26,
    "gradient": 0.19,
    "striped": 0.06,
    "dotted": 0.06,
    "checkered": 0.06,
    "meadow": 0.10,
    "sea": 0.08,
    "night": 0.08,
    "desert": 0.06,
    "snow": 0.05,
}
COLOURED_GROUNDS = 5
