"""What judging by a paid model will cost, and a limit on it."""

from dataclasses import dataclass

from qstar_jax.errors import InputError
from qstar_jax.evaluation.judges.replies import Messages, Reply

BYTES_PER_TOKEN, TOKENS_PER_MESSAGE = 3, 10  # English has about 4 bytes per token, so this errs upwards


def estimate_tokens(messages: Messages) -> int:
    """Tokens of a conversation: one for 3 bytes of its text, and 10 a message."""
    return sum(-(-len(m["content"].encode()) // BYTES_PER_TOKEN) + TOKENS_PER_MESSAGE for m in messages)


@dataclass(frozen=True)
class Estimate:
    """What judging comes to before any call is made.

    Args:
        calls: Calls that are certain: the next one of each question that kept replies do not settle.
        kept: Questions that kept replies settle.
        tokens_in: Tokens of these calls' questions, by `estimate_tokens`.
        tokens_out: Tokens of their replies, if each were as long as `max_tokens` allows.
        dollars: Their price, where prices are known.
        retries: Most further calls a question, for replies that do not decide.
    """

    calls: int
    kept: int
    tokens_in: int
    tokens_out: int
    dollars: float | None
    retries: int

    def __str__(self) -> str:
        if not self.calls:
            return f"no calls: {self.kept:,} replies are kept from before"
        price = "" if self.dollars is None else f", at most about ${self.dollars:,.4f}"
        again = f"; replies that do not decide are asked for again, at most {self.retries}x" if self.retries else ""
        return (
            f"{self.calls:,} calls ({self.kept:,} more are kept from before), about {self.tokens_in:,} tokens in (3 "
            f"bytes each), at most {self.tokens_out:,} out (max_tokens each){price}{again}"
        )


class Budget:
    """Dollars that are spent, those that calls on their way may cost, and a limit.

    Args:
        price_in: Dollars a million tokens of questions.
        price_out: Dollars a million tokens of replies.
        max_cost: Dollars that a judge may spend; None: no limit.

    Raises:
        InputError: If one price is missing, a number is negative, or there is a limit and no price.
    """

    def __init__(self, price_in: float | None = None, price_out: float | None = None, max_cost: float | None = None):
        given = {"price_in": price_in, "price_out": price_out, "max_cost": max_cost}
        for name, value in given.items():
            if value is not None and not value >= 0:
                raise InputError(f"judge.{name} {value}: expected dollars, at least 0")
        if (price_in is None) != (price_out is None):
            raise InputError(
                "judge.price_in and judge.price_out belong together; give both, in dollars a million tokens"
            )
        if max_cost is not None and price_in is None:
            raise InputError(
                f"judge.max_cost {max_cost} has no effect without judge.price_in and judge.price_out (dollars a "
                "million tokens); give them"
            )
        self._prices = None if price_in is None else (price_in, price_out)
        self.max_cost, self.spent = max_cost, 0.0

    def dollars(self, tokens_in: int, tokens_out: int) -> float | None:
        """Price of some tokens; None where prices are not known."""
        if self._prices is None:
            return None
        return (tokens_in * self._prices[0] + tokens_out * self._prices[1]) / 1e6

    def check(self, estimate: Estimate):
        """Refuses what would cost too much, beforehand.

        Raises:
            InputError: If the limit is lower than the estimate and what was spent already.
        """
        if self.max_cost is not None and self.spent + estimate.dollars > self.max_cost:
            before = f" after ${self.spent:,.4f} already spent" if self.spent else ""
            raise InputError(
                f"judge.max_cost ${self.max_cost:,.4f} is less than what judging may cost{before}: {estimate}; raise "
                "it, judge fewer rows, or lower judge.max_tokens"
            )

    def reserve(self, tokens_in: int, tokens_out: int) -> float:
        """Sets aside what a call may cost.

        Returns:
            Dollars; 0 where prices are not known.

        Raises:
            InputError: If nothing is left, as repeated tries cost more than the estimate.
        """
        price = self.dollars(tokens_in, tokens_out) or 0.0
        if self.max_cost is not None and self.spent + price > self.max_cost:
            raise InputError(
                f"judge.max_cost ${self.max_cost:,.4f} is used up by replies that did not decide and were asked for "
                f"again (spent: ${self.spent:,.4f}); the replies are kept: raise it and go on, or lower judge.retries"
            )
        self.spent += price
        return price

    def settle(self, reserved: float, reply: Reply | None):
        """Replaces what was set aside by what the server counted; a call without a reply costs nothing."""
        if reply is None:
            self.spent -= reserved
        elif self._prices is not None and reply.tokens_in is not None and reply.tokens_out is not None:
            self.spent += self.dollars(reply.tokens_in, reply.tokens_out) - reserved
