"""The selector against SliME's rule in plain loops, alone and inside whole sequences. Worst score difference seen in fp32: 2e-6 at a width of 256."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from model.chat import Conversation
from model.connector import Connector
from model.errors import MissingMapError, SpecError
from model.language_model import embedding_rms, load_language_model
from model.selector import LearnableSelector, keep_probabilities, kept_tokens, straight_through, text_direction, token_scores
from model.specs import CompressionSpec, ConnectorSpec, GlobalBranchSpec, LearnableSelectorSpec, LocalBranchSpec, MLPSpec, SingleSpec
from model.specs import TextGuidedSelectorSpec as TextGuided
from model.views import ViewSpec, plan_views
from model.vision_language import VisionLanguageModel, lay_out_images, plan_sequences

TOLERANCE = 1e-5


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cosine(a, b):
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / (max(math.hypot(*a), 1e-8) * max(math.hypot(*b), 1e-8))


def slow_scores(tokens, text, reduce):
    scores = [sum(cosine(token, word) for word in text) for token in tokens]
    return [score / len(text) for score in scores] if reduce == "mean" else scores


def slow_probabilities(scores, temperature):
    exponents = [math.exp((score - max(scores)) / temperature) for score in scores]
    return [value / sum(exponents) for value in exponents]


def slow_kept(probabilities, top_p):
    """The prefix of the ranking whose running sum stays within top_p, and one more; in the old order."""
    if top_p >= 1:
        return list(range(len(probabilities)))
    ranking = sorted(range(len(probabilities)), key=lambda place: (-probabilities[place], place))
    kept, total = [], 0.0
    for place in ranking:
        total += probabilities[place]
        kept.append(place)
        if total > top_p:
            break
    return sorted(kept)


@pytest.mark.parametrize("reduce", ["sum", "mean"])
@pytest.mark.parametrize(("num_tokens", "num_text", "hidden"), [(63, 16, 128), (42, 64, 256)])  # 1,008 and 672 to 256 and 1,024 at 4,096, a 16th
def test_scores_are_sums_of_cosines(reduce, num_tokens, num_text, hidden):
    tokens, text = random(2, num_tokens, hidden), random(2, num_text, hidden, seed=1)
    in_text = torch.ones(2, num_text, dtype=torch.bool)
    in_text[1, num_text // 2 :] = False
    scores = token_scores(tokens, text_direction(text, in_text, reduce))
    for row in range(2):
        words = text[row][in_text[row]].tolist()
        expected = torch.tensor(slow_scores(tokens[row].tolist(), words, reduce))
        assert (scores[row] - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("temperature", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.9, 0.95, 1.0])
def test_what_is_kept(top_p, temperature):
    scores = 2 * random(4, 30)
    candidates = torch.ones(4, 30, dtype=torch.bool)
    candidates[1, 20:] = False
    candidates[2, ::3] = False
    candidates[3] = False
    probabilities = keep_probabilities(scores, candidates, temperature)
    kept = kept_tokens(probabilities, candidates, top_p)
    for row in range(3):
        places = candidates[row].nonzero().squeeze(1)
        expected = slow_probabilities(scores[row][places].tolist(), temperature)
        assert probabilities[row][places].tolist() == pytest.approx(expected, abs=TOLERANCE)
        assert kept[row].nonzero().squeeze(1).tolist() == places[slow_kept(expected, top_p)].tolist()
        assert 1 <= int(kept[row].sum()) <= len(places)
    assert probabilities[3].sum() == 0
    assert not kept[3].any()


def test_equal_scores_keep_the_first_tokens():
    candidates = torch.ones(1, 10, dtype=torch.bool)
    kept = kept_tokens(keep_probabilities(torch.zeros(1, 10), candidates, 1.0), candidates, 0.35)
    assert kept[0].nonzero().squeeze(1).tolist() == [0, 1, 2, 3]


def test_a_zero_vector_scores_nothing():
    tokens = torch.zeros(1, 2, 8)
    direction = text_direction(random(1, 3, 8), torch.ones(1, 3, dtype=torch.bool), "sum")
    assert token_scores(tokens, direction).tolist() == [[0.0, 0.0]]
    assert text_direction(random(1, 3, 8), torch.zeros(1, 3, dtype=torch.bool), "mean").abs().sum() == 0


def test_the_learned_scores_start_near_the_cosines():
    """Rows of an orthogonal matrix keep inner products on average; at full width they keep them exactly."""
    tokens, text = random(1, 40, 64), random(1, 12, 64, seed=1)
    direction = text_direction(text, torch.ones(1, 12, dtype=torch.bool), "sum")
    plain = token_scores(tokens, direction)
    full = LearnableSelector(64, 64, torch.Generator().manual_seed(0))
    torch.testing.assert_close(full(tokens, direction), plain, atol=TOLERANCE, rtol=0)
    assert LearnableSelector(64, 500, torch.Generator().manual_seed(0)).from_text.shape == (64, 64)
    narrow = LearnableSelector(64, 32, torch.Generator().manual_seed(0))
    assert torch.corrcoef(torch.cat([narrow(tokens, direction), plain]))[0, 1] > 0.5


def test_the_learned_scores_are_those_of_tokens_and_text_through_their_own_matrices():
    selector = LearnableSelector(16, 6, torch.Generator().manual_seed(0))
    with torch.no_grad():
        selector.from_tokens.copy_(random(6, 16, seed=3))
        selector.from_text.copy_(random(6, 16, seed=4))
    tokens, text = random(1, 5, 16), random(1, 3, 16, seed=1)
    found = selector(tokens, text_direction(text, torch.ones(1, 3, dtype=torch.bool), "sum"))[0]

    def through(matrix, vector):
        matrix = matrix.detach()
        return [sum(float(matrix[row, k]) * vector[k] for k in range(16)) for row in range(6)]

    for place, token in enumerate(tokens[0].tolist()):
        expected = 0.0
        for word in text[0].tolist():
            ours, theirs = through(selector.from_tokens, token), through(selector.from_text, word)
            expected += sum(a * b for a, b in zip(ours, theirs, strict=True)) / (math.hypot(*token) * math.hypot(*word))
        assert found[place].item() == pytest.approx(expected, abs=TOLERANCE)


def test_straight_through_is_zero_and_has_the_gradient_of_the_log_probabilities():
    scores = random(2, 5).requires_grad_()
    candidates = torch.tensor([[True] * 5, [True, False, True, True, False]])
    bias = straight_through(keep_probabilities(scores, candidates, 1.0), candidates)
    assert torch.equal(bias, torch.zeros(2, 5))
    values = random(2, 5, seed=4)
    (gradient,) = torch.autograd.grad((bias * values).sum(), scores)
    again = scores.detach().requires_grad_()
    logs = torch.stack([torch.log_softmax(row.masked_fill(~there, -torch.inf), dim=0) for row, there in zip(again, candidates, strict=True)])
    (expected,) = torch.autograd.grad((logs.masked_fill(~candidates, 0.0) * values).sum(), again)
    torch.testing.assert_close(gradient, expected, atol=TOLERANCE, rtol=0)
    assert gradient[1, 1] == 0


# Inside whole sequences.


def make_model(folder, selector, *, merge="flat", newline=False):
    fusion = SingleSpec(layer=5)
    spec = ConnectorSpec(
        global_branch=GlobalBranchSpec(fusion=fusion, adapters=MLPSpec()),
        local_branch=LocalBranchSpec(fusion=fusion, compression=CompressionSpec(queries=4), selector=selector, merge=merge, newline=newline),
    )
    language_model = load_language_model(folder)
    connector = Connector(
        spec,
        encoder_width=8,
        num_patches=16,
        hidden=language_model.hidden,
        embedding_rms=embedding_rms(language_model.network),
        generator=torch.Generator().manual_seed(0),
    )
    return VisionLanguageModel(connector, language_model)


PLANS = [plan_views(56 * columns, 56 * rows, 56, ViewSpec.anyres(grids=((columns, rows),))) for columns, rows in ((2, 1), (2, 2), (1, 3))]


def conversation(seed, num_text=9, num_answer=4):
    ids = np.random.default_rng(seed).integers(5, 90, size=2 + num_text + num_answer).tolist()
    answer = (False,) * num_text + (True,) * num_answer
    return Conversation(before=tuple(ids[:2]), after=tuple(ids[2:]), supervised=answer, turns_kept=1)


def batch_of(model, conversations, modes, *, plans=PLANS, pad_left=False, selects=True, noise=None):
    layout = lay_out_images(model.connector, [True] * len(plans), list(plans))
    views = sum(plan.rows * plan.columns for plan in plans)
    return plan_sequences(
        conversations,
        modes,
        list(range(len(plans))),
        layout,
        pad_left=pad_left,
        global_maps={"layer_5": random(len(plans), 16, 8, seed=1)},
        local_maps={"layer_5": random(views, 16, 8, seed=2)},
        selects=selects,
        selector_noise=noise,
    )


def slow_sequence(model, batch, number, *, noise=None, leak=False, shared=None):
    """One sequence without its dropped tokens, from the language model's table and the connector's tokens, token by token."""
    visual = model.visual_tokens(batch)
    table = model.language_model.get_input_embeddings().weight.detach()
    plan, text = PLANS[number], conversation(number)
    spec = model.connector.spec.selector
    first = sum(p.rows * p.columns for p in PLANS[:number])
    local = visual.local_tokens[first : first + plan.rows * plan.columns].flatten(0, 1).detach()
    order = model.connector.local_order(plan).tolist()
    merged = [local[place] for place in order if place >= 0]
    prompt = [*text.before, *(token for token, learned in zip(text.after, text.supervised, strict=True) if leak or not learned)]
    scores = slow_scores([token.tolist() for token in merged], table[prompt].tolist(), spec.reduce)
    if noise is not None:
        scores = [score + spec.noise * float(noise[number, place]) for place, score in enumerate(scores)]
    kept = slow_kept(slow_probabilities(scores, spec.temperature), spec.top_p)
    places = iter(range(len(merged)))
    shown = []
    for place in order:
        if place < 0:
            shown.append(model.connector.newline_token()[0].detach())
        elif (mine := next(places)) in kept:
            shown.append(merged[mine])
    parts = [*table[list(text.before)], *visual.global_tokens[number].detach(), table[model.separator_id], *shown, *table[list(text.after)]]
    return torch.stack(parts), kept


@pytest.mark.parametrize(("merge", "newline"), [("flat", False), ("spatial", False), ("spatial", True)])
@pytest.mark.parametrize("reduce", ["sum", "mean"])
@pytest.mark.parametrize("pad_left", [False, True])
def test_sequences_lose_exactly_the_dropped_tokens(tiny_language_model_folder, merge, newline, reduce, pad_left):
    spec = TextGuided(top_p=0.5, temperature=0.05 if reduce == "mean" else 0.3, reduce=reduce)
    model = make_model(tiny_language_model_folder, spec, merge=merge, newline=newline)
    batch = batch_of(model, [conversation(number) for number in range(3)], ["both"] * 3, pad_left=pad_left)
    sequences = model.sequences(batch, model.visual_tokens(batch), pad_left=pad_left)
    some_dropped = False
    for number in range(3):
        expected, kept = slow_sequence(model, batch, number)
        length = int(sequences.lengths[number])
        found = sequences.embedded[number, -length:] if pad_left else sequences.embedded[number, :length]
        torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
        some_dropped |= len(kept) < len(model.connector.local_order(PLANS[number]))
    assert some_dropped
    assert sequences.embedded.shape[1] == int(sequences.lengths.max())


def test_the_labels_follow_their_tokens(tiny_language_model_folder):
    """The loss of a batch is that of its sequences alone, put together by hand."""
    model = make_model(tiny_language_model_folder, TextGuided(top_p=0.4, temperature=0.3))
    conversations = [conversation(number) for number in range(3)]
    batch = batch_of(model, conversations, ["both"] * 3)
    _, total, _ = model(batch)
    expected = 0.0
    for number in range(3):
        sequence, _ = slow_sequence(model, batch, number)
        logits = model.language_model(inputs_embeds=sequence[None]).logits[0].detach()
        answer = [token for token, learned in zip(conversations[number].after, conversations[number].supervised, strict=True) if learned]
        for back, token in enumerate(reversed(answer)):
            expected -= float(torch.log_softmax(logits[-2 - back], dim=-1)[token])
    assert total.item() == pytest.approx(expected, rel=1e-5)


def test_an_answer_right_behind_the_picture_is_predicted_from_the_last_kept_token(tiny_language_model_folder):
    model = make_model(tiny_language_model_folder, TextGuided(top_p=0.01, temperature=0.01))
    bare = Conversation(before=(7,), after=(11, 12), supervised=(True, True), turns_kept=1)
    batch = batch_of(model, [bare] * 3, ["local"] * 3)
    sequences = model.sequences(batch, model.visual_tokens(batch))
    assert sequences.lengths.tolist() == [1 + 1 + 2] * 3  # one visual token is left
    length = sequences.embedded.shape[1]
    assert sequences.label_positions.tolist() == [row * length + place for row in range(3) for place in (1, 2)]


def test_noise_is_added_to_the_scores(tiny_language_model_folder):
    spec = TextGuided(top_p=0.5, temperature=0.3, noise=2.0)
    model = make_model(tiny_language_model_folder, spec)
    noise = random(3, 16, seed=8)
    conversations = [conversation(number) for number in range(3)]
    batch = batch_of(model, conversations, ["both"] * 3, noise=noise)
    sequences = model.sequences(batch, model.visual_tokens(batch))
    differs = False
    for number in range(3):
        expected, kept = slow_sequence(model, batch, number, noise=noise)
        torch.testing.assert_close(sequences.embedded[number, : int(sequences.lengths[number])], expected, atol=TOLERANCE, rtol=0)
        differs |= kept != slow_sequence(model, batch, number)[1]
    assert differs


def test_the_authors_leak_lets_the_answer_choose(tiny_language_model_folder):
    model = make_model(tiny_language_model_folder, TextGuided(top_p=0.5, temperature=0.3, authors_leak=True))
    batch = batch_of(model, [conversation(number) for number in range(3)], ["both"] * 3)
    sequences = model.sequences(batch, model.visual_tokens(batch))
    for number in range(3):
        expected, _ = slow_sequence(model, batch, number, leak=True)
        torch.testing.assert_close(sequences.embedded[number, : int(sequences.lengths[number])], expected, atol=TOLERANCE, rtol=0)


def test_generation_sees_the_selected_tokens_alone(tiny_language_model_folder):
    model = make_model(tiny_language_model_folder, TextGuided(top_p=0.5, temperature=0.3))
    questions = [replace(conversation(number), supervised=(False,) * 13) for number in range(3)]
    batch = batch_of(model, questions, ["both", "local", "blind"], pad_left=True)
    answers = model.generate(batch, 5)
    sequences = model.sequences(batch, model.visual_tokens(batch), pad_left=True)
    for number in range(3):
        sequence = sequences.embedded[number, -int(sequences.lengths[number]) :].detach()
        expected = []
        for _ in range(5):
            token = int(model.language_model(inputs_embeds=sequence[None]).logits[0, -1].argmax())
            if token == model.tokenizer.eos_token_id:
                break
            expected.append(token)
            sequence = torch.cat([sequence, model.language_model.get_input_embeddings()(torch.tensor([token]))]).detach()
        assert answers[number] == expected


def test_off_is_off_and_a_missing_selector_is_an_error(tiny_language_model_folder):
    model = make_model(tiny_language_model_folder, TextGuided(top_p=0.1, temperature=0.01))
    conversations = [conversation(number) for number in range(3)]
    batch = batch_of(model, conversations, ["both"] * 3, selects=False)
    assert model.sequences(batch, model.visual_tokens(batch)).lengths.tolist() == batch.lengths.tolist()
    without = make_model(tiny_language_model_folder, None)
    batch = batch_of(without, conversations, ["both"] * 3)
    with pytest.raises(MissingMapError, match=r"no selector; add connector\.local\.selector"):
        without(batch)


def test_the_learnable_selector_drops_the_same_tokens_at_full_width_and_learns(tiny_language_model_folder):
    conversations = [conversation(number) for number in range(3)]
    plain = make_model(tiny_language_model_folder, TextGuided(top_p=0.5, temperature=0.3))
    learnable = make_model(tiny_language_model_folder, LearnableSelectorSpec(top_p=0.5, temperature=0.3, width=10_000))
    batches = [batch_of(model, conversations, ["both", "local", "global"]) for model in (plain, learnable)]
    one, two = (model.sequences(batch, model.visual_tokens(batch)) for model, batch in zip((plain, learnable), batches, strict=True))
    torch.testing.assert_close(one.embedded, two.embedded, atol=TOLERANCE, rtol=0)
    loss = learnable(batches[1])[0]
    with torch.no_grad():
        torch.testing.assert_close(loss, learnable(batches[1])[0], atol=TOLERANCE, rtol=TOLERANCE)  # without the mask that carries the gradient
    loss.backward()
    assert learnable.connector.selector.from_tokens.grad.abs().sum() > 0
    assert learnable.connector.selector.from_text.grad.abs().sum() > 0


def test_the_selector_s_gradient_is_that_of_attention_weighed_by_probability(tiny_language_model_folder):
    """Against finite differences: a token's logit of attention raised by the change of its log-probability."""
    model = make_model(tiny_language_model_folder, LearnableSelectorSpec(top_p=0.6, temperature=0.3, width=8))
    batch = batch_of(model, [conversation(number) for number in range(3)], ["both"] * 3)
    parameter = model.connector.selector.from_tokens
    model(batch)[0].backward()
    direction = random(*parameter.shape, seed=6)
    slope = float((parameter.grad * direction).sum())
    sequences = model.sequences(batch, model.visual_tokens(batch))

    def loss_at(step):
        """The kept tokens stay; their attention moves as their log-probabilities do."""
        with torch.no_grad():
            parameter.add_(direction, alpha=step)
            embedded = model.embed_sequences(batch, model.visual_tokens(batch))
            local = batch.gather >= batch.first_local_row
            logs = model._keep_probabilities(batch, embedded.float(), local, model.connector.spec.selector).masked_fill(~local, 1.0).log()
            parameter.add_(direction, alpha=-step)
            return logs

    moved = [loss_at(step) - loss_at(0.0) for step in (1e-2, -1e-2)]
    losses = []
    for change in moved:
        total = 0.0
        for row in range(3):
            length = int(sequences.lengths[row])
            whole = model.embed_sequences(batch, model.visual_tokens(batch))[row]
            places, at = [], 0
            for token in sequences.embedded[row, :length]:
                while not torch.equal(whole[at], token):
                    at += 1
                places.append(at)
                at += 1
            later = torch.ones(length, length, dtype=torch.bool).triu(1)
            mask = change[row][places][None, None, None].expand(1, 1, length, length).masked_fill(later, -1e30)
            with torch.no_grad():
                logits = model.language_model(inputs_embeds=sequences.embedded[row : row + 1, :length], attention_mask=mask).logits[0]
            answer = [token for token, learned in zip(conversation(row).after, conversation(row).supervised, strict=True) if learned]
            for back, token in enumerate(reversed(answer)):
                total -= float(torch.log_softmax(logits[-2 - back].double(), dim=-1)[token])
        losses.append(total)
    assert (losses[0] - losses[1]) / 2e-2 == pytest.approx(slope, rel=0.05, abs=1e-4)


@pytest.mark.parametrize("values", [{"top_p": 0.0}, {"top_p": 1.5}, {"temperature": 0.0}, {"noise": -0.1}, {"top_p": float("nan")}])
@pytest.mark.parametrize("kind", [TextGuided, LearnableSelectorSpec])
def test_impossible_selectors_are_refused(kind, values):
    with pytest.raises(SpecError, match="allowed: top_p above 0 and at most 1"):
        kind(**values)
