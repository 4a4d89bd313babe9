"""Synthetic text that a model can learn: words of a made-up language, a topic a sequence. No download.

Letters: B batch, T sequence length.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from longctx.errors import UsageError
from longctx.training.packages import LightningDataModule

MOST_WORDS, MOST_TOPIC_WORDS = 64, 8
SHORTEST, LONGEST = 2, 6
"""Tokens of a word."""


class SyntheticText(Dataset):
    """Sequences of T + 1 tokens, each a function of (seed, index) alone.

    A language of up to 64 words of 2 to 6 tokens; a sequence keeps to the few words of its topic, 8 at most. What comes
    inside a word follows from the tokens before, and which word comes is easier to tell the more was seen.
    """

    def __init__(self, *, vocab_size: int, sequence_length: int, count: int, seed: int) -> None:
        for name, value, least in (
            ("vocab_size", vocab_size, 2),
            ("sequence_length", sequence_length, 1),
            ("count", count, 1),
        ):
            if not isinstance(value, int) or value < least:
                raise UsageError(f"{name} must be a whole number of at least {least}, not {value!r}")
        self.sequence_length, self.count, self.seed = sequence_length, count, seed
        generator = torch.Generator().manual_seed(seed)
        words = max(2, min(MOST_WORDS, vocab_size // 4))
        self.topic_words = min(MOST_TOPIC_WORDS, words // 2 + 1)
        # Every token stands in about as many places as any other, so that in a large vocabulary it tells its word.
        places = [torch.randperm(vocab_size, generator=generator) for _ in range(-(-words * LONGEST // vocab_size))]
        self.words = torch.cat(places)[: words * LONGEST].view(words, LONGEST)
        self.lengths = torch.randint(SHORTEST, LONGEST + 1, (words,), generator=generator)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        """Tokens `[T + 1]`: the last T of them are the targets of the first T."""
        if not 0 <= index < self.count:
            raise IndexError(index)
        generator = torch.Generator().manual_seed((self.seed << 32) + index + 1)
        topic = torch.randperm(len(self.words), generator=generator)[: self.topic_words]
        count = (self.sequence_length + 1) // SHORTEST + 1
        chosen = topic[torch.randint(len(topic), (count,), generator=generator)]
        inside = torch.arange(LONGEST) < self.lengths[chosen, None]
        return self.words[chosen][inside][: self.sequence_length + 1]


class SyntheticTextDataModule(LightningDataModule):
    """Batches `[B, T + 1]` of synthetic text. The same seed gives the same text on every machine.

    train_sequences, val_sequences: how many sequences an epoch has. shuffle: the order of an epoch, drawn from the
    process's random state as a DataLoader does. num_workers: 0 loads in the training process.
    """

    def __init__(
        self,
        *,
        vocab_size: int = 256,
        sequence_length: int = 128,
        batch_size: int = 8,
        train_sequences: int = 1024,
        val_sequences: int = 64,
        seed: int = 0,
        shuffle: bool = False,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if val_sequences < 0:
            raise UsageError(f"val_sequences must not be negative, not {val_sequences}")
        self.batch_size, self.shuffle, self.num_workers = batch_size, shuffle, num_workers
        count = train_sequences + val_sequences
        self.vocab_size = vocab_size
        self.text = SyntheticText(vocab_size=vocab_size, sequence_length=sequence_length, count=count, seed=seed)
        self.train_sequences, self.val_sequences = train_sequences, val_sequences

    def train_dataloader(self) -> DataLoader:
        return self._loader(range(self.train_sequences), shuffle=self.shuffle)

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        if not self.val_sequences:
            return []
        # The same language, sequences that training does not see.
        return self._loader(range(self.train_sequences, len(self.text)), shuffle=False)

    def _loader(self, indices: range, *, shuffle: bool) -> DataLoader:
        return DataLoader(
            torch.utils.data.Subset(self.text, indices),
            batch_size=self.batch_size,
            shuffle=shuffle,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )
