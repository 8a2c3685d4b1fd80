from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from model.chat import Conversation, tokenise_conversation, tokenise_question
from model.connector import Connector
from model.errors import ConversationError, LanguageModelError, MissingMapError
from model.language_model import describe_folder, embedding_rms, first_token, load_language_model, resolve_folder
from model.losses import evidence_loss, supervised_loss
from model.schedule import parameters_by_block
from model.specs import CompressionSpec, ConnectorSpec, DCISpec, GatedMixtureSpec, GlobalBranchSpec, LocalBranchSpec
from model.views import ViewSpec, plan_views
from model.vision_language import VisionLanguageModel, VisualLayout, lay_out_images, plan_sequences, room_for_text
from workers.training.engine import DeepSpeedEngine, TorchEngine, solo_process_group

NAMES = ("layer_5", "mean_0_2", "mean_3_5")


def make_model(folder, *, precision="fp32", local=True):
    fusion = DCISpec(base=5, groups=((0, 2), (3, 5)))
    spec = ConnectorSpec(
        global_branch=GlobalBranchSpec(fusion=fusion, adapters=GatedMixtureSpec()),
        local_branch=LocalBranchSpec(fusion=fusion, compression=CompressionSpec(queries=4)) if local else None,
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
    return VisionLanguageModel(connector, language_model, precision=precision)


@pytest.fixture(scope="module")
def model(tiny_language_model_folder):
    return make_model(tiny_language_model_folder)


def features(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(count, 16, 8, generator=generator) for name in NAMES}


def column_of(num_views):
    """A plan with so many local views, one below the other."""
    return plan_views(56, 56 * num_views, 56, ViewSpec.anyres(grids=((1, num_views),)))


def batch_of(model, conversations, modes, views=(2, 3, 1, 2), *, pad_left=False):
    images = list(range(len(conversations)))
    views = views[: len(images)]
    layout = lay_out_images(model.connector, [True] * len(images), [column_of(count) for count in views])
    return plan_sequences(
        conversations, modes, images, layout, pad_left=pad_left, global_maps=features(len(images)), local_maps=features(sum(views), seed=2)
    )


TURNS = [("What is it?", "A cat."), ("How many?", "Two")]


def test_the_order_of_a_sequence(model):
    """[text before][global][separator][local][text after], spelled out row by row."""
    conversation = tokenise_conversation(model.tokenizer, TURNS, 1000)
    batch = batch_of(model, [conversation] * 4, ["both", "global", "local", "blind"])
    visual = model.visual_tokens(batch)
    embedded = model.embed_sequences(batch, visual)
    table = model.language_model.get_input_embeddings()
    before, after = (table(torch.tensor(ids)) for ids in (conversation.before, conversation.after))
    separator = table(torch.tensor([model.separator_id]))
    glob, local = visual.global_tokens, visual.local_tokens
    expected = [
        [before, glob[0], separator, local[0], local[1], after],
        [before, glob[1], after],
        [before, local[5], after],
        [before, after],
    ]
    for number, parts in enumerate(expected):
        row = torch.cat(parts)
        assert batch.lengths[number] == len(row)
        assert torch.equal(embedded[number, : len(row)], row)
        assert embedded[number, len(row) :].abs().sum() == 0
    assert model.separator_id == first_token(model.tokenizer, ",")


def test_the_loss_equals_the_language_model_s_own(model):
    conversation = tokenise_conversation(model.tokenizer, TURNS, 1000)
    batch = batch_of(model, [conversation] * 3, ["both", "blind", "local"])
    _, total, correct = model(batch)
    embedded = model.embed_sequences(batch, model.visual_tokens(batch))
    labels = torch.full(batch.gather.shape, -100)
    for number in range(3):
        length = int(batch.lengths[number])
        tail = torch.tensor([t if on else -100 for t, on in zip(conversation.after, conversation.supervised, strict=True)])
        labels[number, length - len(tail) : length] = tail
    mask = (torch.arange(embedded.shape[1])[None] < batch.lengths[:, None]).long()
    reference = model.language_model(inputs_embeds=embedded, attention_mask=mask, labels=labels)
    assert total.item() / (3 * conversation.num_supervised) == pytest.approx(reference.loss.item(), rel=1e-5)
    assert 0 <= correct <= 3 * conversation.num_supervised


def test_the_objective_is_the_answers_loss_and_the_evidence(model):
    conversation = tokenise_conversation(model.tokenizer, TURNS, 1000)
    plain = batch_of(model, [conversation] * 2, ["both", "local"])
    places, words = torch.tensor([0, 5, 19]), torch.tensor([70, 71, 72])
    shown = replace(plain, evidence_places=places, evidence_words=words, evidence_scale=0.25)
    objective, total, correct = model(shown)
    bare_objective, bare_total, bare_correct = model(plain)
    tokens = model.visual_tokens(shown).local_tokens.flatten(0, 1)[places]
    evidence = evidence_loss(tokens, words, model.language_model.get_input_embeddings().weight)
    assert float(evidence.detach()) > 1.0
    torch.testing.assert_close(objective, bare_objective + 0.25 * evidence)
    torch.testing.assert_close(total, bare_total)
    torch.testing.assert_close(bare_objective.detach(), bare_total)
    assert int(correct) == int(bare_correct)
    compression = parameters_by_block(model)["compression"]
    for parameter in compression.values():
        parameter.requires_grad_()
    (gradient,) = torch.autograd.grad(objective - bare_objective, [next(iter(compression.values()))])
    assert float(gradient.abs().sum()) > 0


def test_a_blind_sequence_cannot_begin_with_what_is_learned(tiny_language_model_folder):
    """The hidden state before it would be another sequence's. Behind an image, or a begin token, a caption may stand alone."""
    model = make_model(tiny_language_model_folder)
    caption = Conversation(before=(), after=(2, 3), supervised=(True, True), turns_kept=1)
    with pytest.raises(ConversationError, match="blind sequence begins with a supervised token"):
        batch_of(model, [caption] * 2, ["global", "blind"])
    assert len(batch_of(model, [caption] * 2, ["global", "local"]).label_ids) == 4
    assert batch_of(model, [replace(caption, before=(1,))], ["blind"]).label_positions.tolist() == [0, 1]


@pytest.mark.parametrize("engine", [TorchEngine, DeepSpeedEngine])
def test_both_engines_descend_the_evidence(tiny_language_model_folder, engine):
    """Nothing is supervised but what three local tokens mean, so whatever the connector learns it learns from that."""
    model = make_model(tiny_language_model_folder)
    conversation = Conversation(before=(1,), after=(2, 3), supervised=(False, False), turns_kept=1)
    places, words = torch.tensor([0, 5, 19]), torch.tensor([70, 71, 72])
    plain = batch_of(model, [conversation] * 2, ["local", "local"])
    batch = replace(plain, evidence_places=places, evidence_words=words, evidence_scale=1.0)
    if engine is DeepSpeedEngine:
        solo_process_group()
    running = engine(model, ("compression",))
    running.set_active(("compression",))
    with torch.no_grad():
        first = float(model(batch)[0])
    for _ in range(8):
        sums = running.step([batch], supervised=1, rates={"compression": 1e-2}, max_grad_norm=1.0)
        assert sums.loss == 0.0
    with torch.no_grad():
        last = float(model(batch)[0])
    running.close()
    assert last < 0.5 * first


def test_neighbours_and_padding_do_not_matter(model):
    short = tokenise_conversation(model.tokenizer, TURNS[:1], 1000)
    long = tokenise_conversation(model.tokenizer, TURNS, 1000)
    _, together, _ = model(batch_of(model, [short, long], ["both", "both"]))

    def alone(conversation, image, views):
        layout = lay_out_images(model.connector, [True], [column_of(views.stop - views.start)])
        maps = {
            "global_maps": {k: v[image : image + 1] for k, v in features(2).items()},
            "local_maps": {k: v[views] for k, v in features(5, seed=2).items()},
        }
        return model(plan_sequences([conversation], ["both"], [0], layout, **maps))[0].item()

    expected = alone(short, 0, slice(0, 2)) + alone(long, 1, slice(2, 5))
    assert together.item() == pytest.approx(expected, rel=1e-5)


def test_a_view_that_is_not_there_is_an_error(model):
    conversation = tokenise_conversation(model.tokenizer, TURNS, 1000)
    layout = lay_out_images(model.connector, [False, True], [None, None])
    with pytest.raises(MissingMapError, match="global view of image 0"):
        plan_sequences([conversation], ["global"], [0], layout)
    with pytest.raises(MissingMapError, match="local views of image 1"):
        plan_sequences([conversation], ["local"], [1], layout)
    assert plan_sequences([conversation], ["both"], [1], layout).lengths.tolist() == [conversation.num_text_tokens + 16]


def test_generation_is_greedy_and_does_not_depend_on_the_batch(model):
    """Against a slow loop that runs the whole sequence anew for every token."""
    questions = [tokenise_question(model.tokenizer, text, 1000) for text in ("What is it?", "Who?", "How many are there in all?", "Where?")]
    modes = ["both", "global", "blind", "local"]
    batch = batch_of(model, questions, modes, pad_left=True)
    answers = model.generate(batch, max_new_tokens=6)
    embedded = model.embed_sequences(batch, model.visual_tokens(batch)).detach()
    for number in range(4):
        sequence = embedded[number, -int(batch.lengths[number]) :]
        expected = []
        for _ in range(6):
            token = int(model.language_model(inputs_embeds=sequence[None]).logits[0, -1].argmax())
            if token == model.tokenizer.eos_token_id:
                break
            expected.append(token)
            sequence = torch.cat([sequence, model.language_model.get_input_embeddings()(torch.tensor([token]))]).detach()
        assert answers[number] == expected


def test_generation_stops_at_the_end_token(model):
    network = model.language_model.get_input_embeddings()
    before = network.weight.detach().clone()
    questions = [tokenise_question(model.tokenizer, "Who?", 1000)]
    batch = batch_of(model, questions, ["blind"], pad_left=True)
    first = model.generate(batch, 1)[0][0]
    model.tokenizer.eos_token_id, ended = first, model.tokenizer.eos_token_id
    try:
        assert model.generate(batch, 5) == [[]]
    finally:
        model.tokenizer.eos_token_id = ended
    assert torch.equal(before, network.weight)


def test_bf16_is_close_to_fp32(model, tiny_language_model_folder):
    half = make_model(tiny_language_model_folder, precision="bf16")
    conversation = tokenise_conversation(model.tokenizer, TURNS, 1000)
    one, two = (m(batch_of(m, [conversation] * 2, ["both", "local"]))[0].item() for m in (model, half))
    assert one == pytest.approx(two, rel=2e-3)


def test_room_for_text(model):
    assert room_for_text(2048, model.connector, column_of(6)) == 2048 - 16 - 1 - 24


def test_without_a_local_branch(tiny_language_model_folder):
    model = make_model(tiny_language_model_folder, local=False)
    conversation = tokenise_conversation(model.tokenizer, TURNS, 1000)
    layout = lay_out_images(model.connector, [True], [None])
    batch = plan_sequences([conversation], ["both"], [0], layout, global_maps=features(1))
    assert batch.lengths.tolist() == [conversation.num_text_tokens + 16]
    model(batch)[0].backward()


def test_empty_supervision_is_zero():
    loss = supervised_loss(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.nn.Linear(4, 5))
    assert loss.total.item() == 0
    assert loss.count == 0


def test_identity_covers_weights_and_template(tiny_language_model_folder, tmp_path):
    import shutil

    first = describe_folder(tiny_language_model_folder, "a")
    copy = shutil.copytree(tiny_language_model_folder, tmp_path / "copy")
    assert describe_folder(copy, "a") == first
    template = next(copy.glob("chat_template*"))
    template.write_text(template.read_text() + " ")
    assert describe_folder(copy, "a") != first


def test_a_folder_that_lacks_a_part_is_refused(tiny_language_model_folder, tmp_path):
    import shutil

    copy = shutil.copytree(tiny_language_model_folder, tmp_path / "copy")
    (copy / "model.safetensors").unlink()
    with pytest.raises(LanguageModelError, match=r"lacks weights"):
        resolve_folder(str(copy))
    with pytest.raises(LanguageModelError, match=r"no such folder"):
        resolve_folder("./nowhere")
    with pytest.raises(LanguageModelError, match=r"found neither \(.*Check the name and the connection"):
        resolve_folder("nobody/nothing-of-this-name")


def test_a_head_with_something_behind_it_is_refused(tiny_language_model_folder, monkeypatch):
    from transformers import LlamaForCausalLM

    real = LlamaForCausalLM.forward

    def capped(self, *args, **kwargs):
        return SimpleNamespace(logits=torch.tanh(real(self, *args, **kwargs).logits) * 2)

    monkeypatch.setattr(LlamaForCausalLM, "forward", capped)
    with pytest.raises(LanguageModelError, match="behind the head"):
        load_language_model(tiny_language_model_folder)


def test_labels_predict_the_next_token():
    conversation = Conversation(before=(1, 2), after=(3, 4, 5), supervised=(False, True, True), turns_kept=1)
    layout = VisualLayout(
        tokens_per_global_view=2, tokens_per_local_view=1, separator=True, global_index=(0,), first_view=(0,), local_orders=(np.zeros(0, dtype=int),)
    )
    batch = plan_sequences([conversation], ["global"], [0], layout)
    assert batch.gather.tolist() == [[3, 4, 8, 9, 5, 6, 7]]
    assert batch.label_positions.tolist() == [4, 5]
    assert batch.label_ids.tolist() == [4, 5]
    assert np.asarray(batch.text_ids).tolist() == [1, 2, 3, 4, 5]
