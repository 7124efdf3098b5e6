"""Draft trees as SGLang stores them: next-token and next-sibling links, a mask, and the greedy walk over them."""

import torch


def build_tree_kernel_efficient_cpu(  # type: ignore[no-untyped-def]
    parent_list,
    selected_index,
    verified_seq_len,
    tree_mask,
    positions,
    retrive_index,
    retrive_next_token,
    retrive_next_sibling,
    topk,
    depth,
    draft_token_num,
    tree_mask_mode,
):
    """Links, positions and mask of each request's tree; mask mode 0 has the whole context in front of the nodes."""
    nodes = draft_token_num
    offset = 0
    for request in range(parent_list.shape[0]):
        length = int(verified_seq_len[request])
        parents = _parents(selected_index[request].tolist(), parent_list[request].tolist(), topk, nodes)
        _write_links(request, parents, retrive_index, retrive_next_token, retrive_next_sibling)
        context = length if tree_mask_mode == 0 else 0
        width = context + nodes
        for node in range(nodes):
            row = tree_mask[offset + node * width : offset + (node + 1) * width]
            path = _path(parents, node)
            row[context:] = False
            row[[context, *(context + each for each in path)]] = True
            positions[request * nodes + node] = length + len(path)
        offset += nodes * width


def reconstruct_indices_from_tree_mask(  # type: ignore[no-untyped-def]
    tree_mask,
    verified_seq_len,
    positions,
    retrive_index,
    retrive_next_token,
    retrive_next_sibling,
    batch_size,
    draft_token_num,
):
    """The same from a mask [requests, nodes, nodes] of ancestors."""
    masks = tree_mask.view(batch_size, draft_token_num, draft_token_num).tolist()
    for request, mask in enumerate(masks):
        ancestors = [[other for other in range(node) if mask[node][other]] for node in range(draft_token_num)]
        parents = [each[-1] if each else -1 for each in ancestors]
        _write_links(request, parents, retrive_index, retrive_next_token, retrive_next_sibling)
        for node, path in enumerate(ancestors):
            positions[request * draft_token_num + node] = int(verified_seq_len[request]) + len(path)


def verify_tree_greedy_cpu(  # type: ignore[no-untyped-def]
    predicts,
    accept_index,
    accept_token_num,
    candidates,
    retrive_index,
    retrive_next_token,
    retrive_next_sibling,
    target_predict,
):
    """From the root, follow the child that the target would have emitted; its prediction at the end is the bonus."""
    predicted = target_predict.reshape(-1).tolist()
    for request in range(candidates.shape[0]):
        tokens = candidates[request].tolist()
        rows, children, siblings = (
            links[request].tolist() for links in (retrive_index, retrive_next_token, retrive_next_sibling)
        )
        node, path = 0, [0]
        while len(path) < accept_index.shape[1]:
            child = children[node]
            while child != -1 and tokens[child] != predicted[rows[node]]:
                child = siblings[child]
            if child == -1:
                break
            node = child
            path.append(node)
        for place, each in enumerate(path):
            accept_index[request, place] = rows[each]
            predicts[rows[each]] = predicted[rows[each]]
        accept_token_num[request] = len(path) - 1


def fill_bonus_tokens_cpu(accept_tokens, accept_lens, bonus_tokens, accept_stride):  # type: ignore[no-untyped-def]
    """The last accepted token of each request."""
    tokens = accept_tokens.view(-1, accept_stride)
    bonus_tokens.copy_(tokens.gather(1, (accept_lens.long() - 1).view(-1, 1)).view(-1))


def fill_accept_out_cache_loc_cpu(accept_index, out_cache_loc, accept_out_cache_loc, size=None):  # type: ignore[no-untyped-def]
    """The slots of the accepted nodes, packed."""
    accepted = accept_index.reshape(-1)[:size]
    accepted = accepted[accepted > -1].long()
    accept_out_cache_loc[: accepted.numel()] = out_cache_loc[accepted]


def _parents(selected, flat_parents, topk, num_nodes):  # type: ignore[no-untyped-def]
    """Each node's parent node; ``selected`` are flat indices into the pool of candidates, topk per parent."""
    node_of = {index: node for node, index in reversed(list(enumerate(selected, 1)))}
    parents = [-1] * num_nodes
    for node in range(1, num_nodes):
        group = selected[node - 1] // topk
        parents[node] = 0 if group == 0 else node_of[flat_parents[group]]
    return parents


def _write_links(request, parents, retrive_index, retrive_next_token, retrive_next_sibling):  # type: ignore[no-untyped-def]
    count = len(parents)
    first_child, next_sibling = [-1] * count, [-1] * count
    for node in range(count - 1, 0, -1):
        parent = parents[node]
        if parent >= 0:
            next_sibling[node] = first_child[parent]
            first_child[parent] = node
    rows = range(request * count, (request + 1) * count)
    for links, values in (
        (retrive_index, list(rows)),
        (retrive_next_token, first_child),
        (retrive_next_sibling, next_sibling),
    ):
        links[request] = torch.tensor(values, dtype=links.dtype)


def _path(parents, node):  # type: ignore[no-untyped-def]
    """The node and its ancestors, the root excluded."""
    path = []
    while node > 0:
        path.append(node)
        node = parents[node]
    return path
