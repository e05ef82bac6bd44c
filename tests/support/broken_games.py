"""A game that keeps every rule, and one for each way to break one. Registered by `test_check`."""

import random
import sys
import threading
import time

from oel_ray.envs import Step


class Good:
    """Three letters are to be said in the right order."""

    actions = ("[a]", "[b]", "[c]")

    def __init__(self, seed, params):
        chance = random.Random(seed)
        self.word = [chance.choice(("[a]", "[b]", "[c]")) for _ in range(3)]
        self.instructions = "Say [a], [b] or [c]. The first letter is known."
        self.map_hash = "".join(self.word)
        self.place = 0

    def reset(self):
        return f"It begins with {self.word[0]}."

    def step(self, response):
        action = next((action for action in self.actions if action in response), "")
        if action != self.word[self.place]:
            return Step(action, "No.", False, "")
        self.place += 1
        return Step(action, "Yes.", self.success(), "All said." if self.success() else "")

    def success(self):
        return self.place == len(self.word)

    def solution(self):
        return list(self.word)


class BuildRaises(Good):
    def __init__(self, seed, params):
        super().__init__(seed, params)
        if seed == 3:
            raise KeyError("no map")


class BuildExits:
    def __init__(self, seed, params):
        sys.exit("bye")


def build_takes_nothing():
    return Good(1, {})


class NoHash(Good):
    @property
    def map_hash(self):
        raise RuntimeError("not yet")

    @map_hash.setter
    def map_hash(self, value):
        pass


class NoInstructions(Good):
    def __init__(self, seed, params):
        super().__init__(seed, params)
        self.instructions = " "


class ActionsAreText(Good):
    actions = "abc"


class ChangesInstructions(Good):
    def reset(self):
        self.instructions += " Go."
        return super().reset()


class Unprintable:
    def __repr__(self):
        raise ValueError("no repr")


class ResetReturnsNothing(Good):
    def reset(self):
        return Unprintable()


class ResetIsMissing(Good):
    reset = None


class RaisesOnEmptyText(Good):
    def step(self, response):
        response.split()[0]
        return super().step(response)


class ReturnsTuple(Good):
    def step(self, response):
        return tuple(super().step(response))


class DoneIsNumber(Good):
    def step(self, response):
        return super().step(response)._replace(done=1)


class FeedbackIsNothing(Good):
    def step(self, response):
        return super().step(response)._replace(feedback=None)


class OutcomeTooEarly(Good):
    def step(self, response):
        return super().step(response)._replace(outcome="It goes on.")


class NoOutcome(Good):
    def step(self, response):
        return super().step(response)._replace(outcome="")


class WearsOut(Good):
    actions = ()
    steps = 0

    def step(self, response):
        self.steps += 1
        if self.steps > 40:
            raise RuntimeError("too long")
        return Step("", "No.", False, "")

    def solution(self):
        return None


class UnreadAction(Good):
    actions = ("[a]", "[b]", "[c]", "[d]")

    def step(self, response):
        return super().step(response.replace("[d]", ""))

    def solution(self):
        return None


class SuccessIsNothing(Good):
    def success(self):
        return self.place == len(self.word) or None


class SuccessIsGiven(Good):
    def success(self):
        return self.place in (0, len(self.word))


class SuccessNeedsReset(Good):
    def success(self):
        return self.started and super().success()

    def reset(self):
        self.started = True
        return super().reset()


class WrongSolution(Good):
    def solution(self):
        return ["[a]", "[a]"]


class LongSolution(Good):
    def solution(self):
        return [*self.word, "[a]"]


class SolutionIsText(Good):
    def solution(self):
        return "".join(self.word)


class SolutionPlays(Good):
    def solution(self):
        self.step(self.word[0])
        return list(self.word)


class Clock(Good):
    def step(self, response):
        return super().step(response)._replace(feedback=f"It is {time.perf_counter_ns()}.")


class GlobalRandom(Good):
    def step(self, response):
        return super().step(response)._replace(feedback=f"{random.random()}")


class SharedState(Good):
    def __init__(self, seed, params):
        super().__init__(seed, params)
        type(self).last = self.map_hash

    def step(self, response):
        return super().step(response)._replace(feedback=type(self).last)


class SeedsGlobally(Good):
    def __init__(self, seed, params):
        random.seed(seed)
        super().__init__(seed, params)


class UsesHash(Good):
    def reset(self):
        return f"Room {hash('room')}."


class OneHash(Good):
    def __init__(self, seed, params):
        super().__init__(seed, params)
        self.map_hash = "same"


class Prints(Good):
    def step(self, response):
        print("thinking")
        return super().step(response)


class Thread(Good):
    def __init__(self, seed, params):
        super().__init__(seed, params)
        threading.Thread(target=time.sleep, args=(5,), daemon=True).start()


class OneMap(Good):
    def __init__(self, seed, params):
        super().__init__(1, params)


class SlowStep(Good):
    def step(self, response):
        time.sleep(0.003)
        return super().step(response)


class SlowBuild(Good):
    def __init__(self, seed, params):
        time.sleep(0.003)
        super().__init__(seed, params)


class Hopeless:
    """Everything raises."""

    def __init__(self, seed, params):
        pass

    def __getattr__(self, name):
        raise OSError(f"no {name}")
