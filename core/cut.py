"""Where a post that is too long is cut: the rule of the OpenAI code, found with few tokenisations.

    cut(post, over, small, limit, around)     # over(head): how many tokens too many the query has with this head

`by_definition` cuts once after the other, which takes a tokenisation each. Here the head is searched for: from one end
of a line (or, in a line, of a word) to the next, the number of tokens grows, and nearly evenly, so that a line through
two measured points tells about where it passes the limit. Within a word it need not grow (half a word may be more
tokens than the whole); what its pieces take is seen from the word and its neighbours alone.
"""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections.abc import Callable, Sequence

NEAR = 50  # characters that matter to how the next is tokenised
LONG = 200  # characters between two ends, all of which may be tried


def by_definition(post: str, over: Callable[[str], int]) -> str:
    """While it is too long the post is cut at its last newline, or loses a character."""
    while (n := over(post)) > 0 and post:
        newline = post.rfind("\n")
        post = post[:newline] if newline >= 0 else post[: -max(1, n // 4)]  # a character is at most 4 tokens
    return post


def cut(
    post: str, over: Callable[[str], int], small: Callable[[list[str], bool], list[int]], limit: int, around: int
) -> str:
    """`by_definition` in about 6 tokenisations. small: how many tokens each of several short pieces of the post has
    with what follows it (and, if so, what stands before it), in one call; around: the characters of both."""
    at = functools.cache(lambda size: over(post[:size]))
    if at(len(post)) <= 0 or not post:
        return post
    newlines = [i for i, character in enumerate(post) if character == "\n"]
    # what stands before the post takes tokens, too: about as many as its length
    high = (len(post), at(len(post)))
    low = (0, around * (high[1] + limit) / (len(post) + around) - limit)
    solid = [len(post[:i].rstrip()) for i in newlines]
    ends = [i for k, i in enumerate(newlines) if not k or solid[k] > solid[k - 1]]  # not those of blank lines
    below, above = between(ends, low, high, at)
    for size in reversed(newlines):
        if below < size < above and at(size) <= 0:
            return post[:size]
    if below >= 0:
        return post[:below]
    line = min([*newlines, len(post)])  # not even the first line fits: by words, then by characters
    ends = [i for i in range(1, line) if post[i].isspace() and not post[i - 1].isspace()]
    below, above = between(ends, low, (line, at(line)), at)
    if above - below > LONG:  # no word, but a link or code: by its signs
        ends = [i for i in range(max(below, 0) + 1, above) if post[i].isalnum() != post[i - 1].isalnum()]
        inside, above = between(ends, (below, at(below)) if below > 0 else low, (above, at(above)), at)
        below = max(below, inside)
    below = max(below, 0)
    while above - below > LONG:  # or a script without spaces
        middle = (below + above) // 2
        below, above = (middle, above) if at(middle) <= 0 else (below, middle)
    start, sizes = max(below - NEAR, 0), range(above - 1, below, -1)
    less, *more = small([post[start:size] for size in (below, *sizes)], start == 0)
    for size, n in zip(sizes, more):
        if at(below) + n - less <= 0 and at(size) <= 0:
            return post[:size]
    return post[:below]


def between(sizes: Sequence[int], low: tuple, high: tuple, at: Callable[[int], int]) -> tuple[int, int]:
    """Of ascending sizes the last that fits and the first that does not (-1, or the size of `high`, if there is none).

    low, high: a size and how many tokens are too many there, of which the first may be an estimate."""
    i, j, turn = -1, len(sizes), 0
    while j - i > 1:
        turn += 1
        guess = low[0] - low[1] * (high[0] - low[0]) / (high[1] - low[1])
        k = (i + j) // 2 if turn % 4 == 0 else min(max(bisect_right(sizes, guess) - 1, i + 1), j - 1)
        found = (sizes[k], at(sizes[k]))
        if found[1] <= 0:
            i, low = k, found
        else:
            j, high = k, found
    return sizes[i] if i >= 0 else -1, sizes[j] if j < len(sizes) else high[0]
