"""Images of persons by identity and camera, as in Market-1501 and DukeMTMC-reID, and draws of whole identities."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from wellcond.lab.data.named_data import GET_REID
from wellcond.lab.data.splits import Indices, derived_seed
from wellcond.lab.errors import LabError

FOLDERS = ("bounding_box_train", "query", "bounding_box_test")
# 0002_c1s1_000451_03.jpg of Market-1501, 0002_c1_f0044158.jpg of DukeMTMC-reID.
_NAME = re.compile(r"(-1|\d+)_c(\d+)")
_JUNK, _DISTRACTOR = -1, 0


@dataclass(frozen=True)
class PersonImages:
    """Image files with who is seen, and by which camera.

    Attributes:
        files: The files, [n].
        identities: The person in each; 0 for distractors, who are nobody's match.
        cameras: The camera of each.
    """

    files: tuple[Path, ...]
    identities: Indices
    cameras: Indices

    def __len__(self) -> int:
        return len(self.files)

    def take(self, positions: Indices) -> PersonImages:
        """Return the images at these positions."""
        return PersonImages(
            tuple(self.files[position] for position in positions.tolist()),
            self.identities[positions],
            self.cameras[positions],
        )

    def joined(self, other: PersonImages) -> PersonImages:
        """Return these images and then the others."""
        return PersonImages(
            self.files + other.files,
            np.concatenate([self.identities, other.identities]),
            np.concatenate([self.cameras, other.cameras]),
        )

    def fingerprint(self) -> str:
        """Return a digest of the files' names, which tell identity and camera, and of their sizes in bytes."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(f"{file.parent.name}/{file.name} {file.stat().st_size}\n".encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class PersonSearch:
    """Images that are searched for, and the images that they are searched in."""

    query: PersonImages
    gallery: PersonImages


def is_reid(path: Path) -> bool:
    """Return whether a folder has the layout of Market-1501."""
    return any((path / name).is_dir() for name in FOLDERS)


def read_persons(folder: Path) -> PersonImages:
    """List the images of a folder, in the order of their names; images of identity -1 are junk and left out.

    Raises:
        LabError: If the folder is missing or empty, or a name does not begin with identity and camera.
    """
    if not folder.is_dir():
        raise LabError(f"--data {folder.parent}: needs a folder {folder.name} of images; {GET_REID}")
    files, identities, cameras = [], [], []
    for file in sorted(folder.glob("*.jpg")):
        match = _NAME.match(file.name)
        if match is None:
            raise LabError(f"--data {file}: names must begin as 0002_c1, identity and camera")
        identity, camera = int(match[1]), int(match[2])
        if max(identity, camera) >= 2**31:
            raise LabError(f"--data {file}: identity and camera must be below {2**31}")
        if identity != _JUNK:
            files.append(file)
            identities.append(identity)
            cameras.append(camera)
    if not files:
        raise LabError(f"--data {folder}: there are no images NNNN_cN*.jpg in there; {GET_REID}")
    return PersonImages(tuple(files), np.array(identities, dtype=np.int64), np.array(cameras, dtype=np.int64))


def draw_identities(identities: Indices, count: int, seed: int) -> Indices:
    """Draw whole identities until there are so many images; of the last one only as many as are lacking.

    Args:
        identities: Of each image, [n]; each distractor stands for itself.
        count: How many images, at most n.
        seed: The draw is a function of the identities, the count and this.

    Returns:
        The positions of the drawn images, ascending, [count].

    Raises:
        ValueError: If `count` is not between 0 and n.

    >>> len(draw_identities(np.array([1, 1, 1, 2, 2, 2]), 4, seed=0))
    4
    """
    if not 0 <= count <= len(identities):
        raise ValueError(f"count must be between 0 and {len(identities)}, got {count}")
    generator = np.random.default_rng(seed)
    # Negative numbers are nobody's.
    own = np.where(identities == _DISTRACTOR, -1 - np.arange(len(identities)), identities)
    persons, places = np.unique(own, return_inverse=True)
    rank = np.empty(len(persons), dtype=np.int64)
    rank[generator.permutation(len(persons))] = np.arange(len(persons))
    shuffled = generator.permutation(len(identities))
    drawn = shuffled[np.argsort(rank[places[shuffled]], kind="stable")][:count]
    return np.sort(drawn)


def make_search(images: PersonImages, seed: int) -> PersonSearch:
    """Make a search out of images: of each identity and camera one image is searched for, the others are searched in.

    As Market-1501 was made. An image without a match by another camera is searched in instead.

    Args:
        images: The images.
        seed: The draw is a function of the images and this.
    """
    order = np.random.default_rng(seed).permutation(len(images))
    pairs = np.stack([images.identities, images.cameras], axis=1)[order]
    _, firsts = np.unique(pairs, axis=0, return_index=True)
    asked = np.zeros(len(images), dtype=bool)
    asked[order[firsts]] = True
    gallery = images.take(np.flatnonzero(~asked))
    for position in np.flatnonzero(asked):
        matches = (gallery.identities == images.identities[position]) & (gallery.cameras != images.cameras[position])
        asked[position] = bool(matches.any()) and images.identities[position] != _DISTRACTOR
    return PersonSearch(images.take(np.flatnonzero(asked)), images.take(np.flatnonzero(~asked)))


@dataclass(frozen=True)
class PersonSplit:
    """One seed's training images and the search that validates; they share no identity."""

    train: PersonImages
    validation: PersonSearch


def held_out_surplus(identities: Indices) -> int:
    """Return how many training images may be lost to keep whole identities apart: all but one of the largest."""
    return int(np.unique(identities, return_counts=True)[1].max()) - 1


def draw_persons(pool: PersonImages, train: int, validation: int, seed: int) -> PersonSplit:
    """Draw one seed's training images and its validation search.

    Args:
        pool: The images that do not test.
        train: How many images train.
        validation: How many validate; with `train` and `held_out_surplus` at most all.
        seed: The comparison's seed.
    """
    held_out = draw_identities(pool.identities, validation, derived_seed("validation", seed))
    # Also the images of the identity that was cut: who validates does not train.
    rest = pool.take(np.flatnonzero(~np.isin(pool.identities, pool.identities[held_out])))
    chosen = draw_identities(rest.identities, train, derived_seed("train", seed))
    search = make_search(pool.take(held_out), derived_seed("validation search", seed))
    return PersonSplit(rest.take(chosen), search)
