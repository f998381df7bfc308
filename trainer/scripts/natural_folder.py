#!/usr/bin/env python3
"""Writes CIFAR-100 as folders of JPEGs in ten classes of 5,000 training and 1,000 test images each.

    trainer/scripts/natural_folder.py data/cifar-100-binary data/natural

A class is two of the 20 superclasses together. Needs Pillow. The result is an example for `butterflyvit-trainer
specialise`: OUT/train/CLASS/NUMBER.jpg and OUT/test/CLASS/NUMBER.jpg.
"""
import pathlib
import sys

from PIL import Image

CLASSES = {
    "water animals": ("aquatic_mammals", "fish"),
    "flowers and fruit": ("flowers", "fruit_and_vegetables"),
    "containers and devices": ("food_containers", "household_electrical_devices"),
    "furniture and buildings": ("household_furniture", "large_man-made_outdoor_things"),
    "invertebrates": ("insects", "non-insect_invertebrates"),
    "large mammals": ("large_carnivores", "large_omnivores_and_herbivores"),
    "smaller mammals": ("medium_mammals", "small_mammals"),
    "landscapes and trees": ("large_natural_outdoor_scenes", "trees"),
    "people and reptiles": ("people", "reptiles"),
    "vehicles": ("vehicles_1", "vehicles_2"),
}
SIDE = 32
RECORD = 2 + 3 * SIDE * SIDE  # Coarse label, fine label, then the planes red, green and blue.


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    source, out = map(pathlib.Path, sys.argv[1:])
    superclasses = (source / "coarse_label_names.txt").read_text().split()
    class_of = {superclasses.index(name): label for label, pair in CLASSES.items() for name in pair}
    for part in ("train", "test"):
        for label in CLASSES:
            (out / part / label).mkdir(parents=True, exist_ok=True)
        records = (source / f"{part}.bin").read_bytes()
        for number in range(len(records) // RECORD):
            record = records[number * RECORD:(number + 1) * RECORD]
            planes = [Image.frombytes("L", (SIDE, SIDE), record[2 + plane * SIDE * SIDE:][:SIDE * SIDE])
                      for plane in range(3)]
            path = out / part / class_of[record[0]] / f"{number:05}.jpg"
            Image.merge("RGB", planes).save(path, quality=95)
        print(f"{part}: {len(records) // RECORD} images", file=sys.stderr)


if __name__ == "__main__":
    main()
