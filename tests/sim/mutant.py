"""Faults put into the C on purpose: each must be found by a history, named by its law.

A mutant is an edit of the source at build time; what ships knows nothing of it. One without is a patch of the engine,
of the same name in `tests/sim/patch.py`.
"""

from typing import NamedTuple

from tests.sim.build import Edit


class Mutant(NamedTuple):
    """What is broken, which law or promise that is, and how."""

    name: str
    law: str
    edit: Edit | None = None
    sorts: tuple[str, ...] = ()  # of image, on which it is found sooner
    is_full: bool = False  # it takes a host that is full for a while
    is_filled: bool = False  # one that stays full
    walks: bool = False  # it is found among the deaths in last lives
    is_direct: bool = False  # data goes by O_DIRECT

    @property
    def workload(self) -> str:
        """What finds it."""
        sorts = ", ".join(self.sorts) or "all sorts"
        host = ", full host" * self.is_full + ", full for good" * self.is_filled
        return sorts + host + ", deaths walked" * self.walks + ", O_DIRECT" * self.is_direct


MUTANTS = [
    Mutant(
        "late_waiters_are_served",
        "Law 2: a sync serves who waited when it started",
        Edit(
            "ring/commit.c",
            "    operations_advance(worker);\n}\n\nvoid grace_advance",
            "    serve_line(worker, &file->waiting, file->error ? -EIO : 0);\n"
            "    operations_advance(worker);\n}\n\nvoid grace_advance",
        ),
    ),
    Mutant(
        "flush_does_nothing",
        "Law 2",
        Edit("ring/commit.c", "if (file->error || !file->syncs) {", "if (file->error || waiter->request) {"),
    ),
    Mutant(
        "writethrough_is_forgotten",
        "Law 2, writethrough",
        Edit("virtio/block.c", "if (block->writethrough && modifies(request)", "if (!block && modifies(request)"),
    ),
    Mutant(
        "flush_forgets_waiting_links",
        "Law 2: a sync is no flush while links wait",
        Edit("virtio/block.c", "    if (!block->flush_punts) {", "    if (block) {"),
        ("overlay", "overlay-lazy"),
    ),
    Mutant(
        "followers_never_leave",
        "liveness: who joined a flush is answered",
        Edit(
            "virtio/block.c",
            "        line_join(&block->flushing->followers, &request->waiter);",
            "        (void)request;",
        ),
    ),
    Mutant(
        "name_comes_before_the_data",
        "Law 1 and 3: a place is filled before it is named",
        Edit(
            "virtio/block.c",
            "    result = place_fill(worker, request, &place, start, nbytes);",
            "    name_place(block, worker, &place);\n    result = place_fill(worker, request, &place, start, nbytes);",
        ),
    ),
    Mutant(
        "place_is_given_twice",
        "Law 1: a place is held while its bytes are on their way",
        Edit("qcow2/plane/fresh.c", "        return -EBUSY;", "        (void)map;"),
        is_direct=True,
    ),
    Mutant(
        "engine_does_not_wait_for_a_place_that_is_held",
        "Law 1: whoever changes an entry holds its cluster",
        is_direct=True,
    ),
    Mutant(
        "one_name_stands_for_all",
        "Law 1: a request is answered when all of its places are named",
        Edit(
            "virtio/place.c",
            "        flights->count--;\n        result = 0;",
            "        for (flights->count--; result == 0 && request->flight; flights->count--)\n"
            "            end(map, worker, leave(flights, request, &flights->first_free), 0, 0, &landing);\n"
            "        result = 0;",
        ),
    ),
    Mutant(
        "mark_is_not_renewed",
        "Law 1: a record counts once the mark names it",
        Edit(
            "virtio/place.c",
            "    return worker_write_word(worker, place->name_slot, place->mark_offset,",
            "    return !worker ? 0 : 0 && worker_write_word(worker, place->name_slot, place->mark_offset,",
        ),
        ("overlay", "overlay-lazy"),
    ),
    Mutant(
        "waiting_link_is_not_logged",
        "Law 1",
        Edit(
            "virtio/place.c",
            "    worker_store_memory(worker, place->memory, place->name_offset, place->name, place->name_nbytes);",
            "    (void)worker;",
        ),
        ("overlay", "overlay-lazy"),
    ),
    Mutant(
        "short_transfer_is_all",
        "Law 1: a transfer is carried through",
        Edit(
            "ring/transfer.c",
            "        operation->progress += result;\n        ASSERT",
            "        operation->progress = operation->nbytes;\n        ASSERT",
        ),
    ),
    Mutant(
        "rest_of_an_encrypted_write_is_taken_for_its_start",
        "Law 1: a transfer is carried through",
        Edit("ring/bounce.c", "cipher_sector(operation, operation->progress), ", "cipher_sector(operation, 0), "),
        ("encrypted", "encrypted-overlay", "encrypted-parts"),
    ),
    Mutant(
        "cancelled_work_is_done",
        "Law 1: what io_uring cancelled was not done",
        Edit(
            "ring/transfer.c", "        result = perform_here(worker, number);", "        result = operation->nbytes;"
        ),
    ),
    Mutant(
        "cancelled_sync_is_done",
        "Law 2",
        Edit("ring/commit.c", "        result = host_sync(file->fd);", "        result = 0;"),
        ("512", "snapshot"),
    ),
    Mutant(
        "refused_work_is_forgotten",
        "liveness: what the kernel does not take now is offered again",
        Edit(
            "ring/transfer.c",
            "    if (result == -EINTR || result == -EAGAIN)\n",
            "    if (result == -EAGAIN)\n        return;\n    if (result == -EINTR)\n",
        ),
    ),
    Mutant(
        "the_ring_is_not_looked_at_again",
        "liveness: between arming and sleeping a chain may come",
        Edit(
            "ring/queue.c",
            "    return more;",
            "    return more && false;",
        ),
    ),
    Mutant(
        "kicks_are_never_asked_for",
        "liveness",
        Edit(
            "ring/virtqueue_split.c",
            "        shared_store16(avail_event(queue), queue->next_available);",
            "        (void)avail_event(queue);",
        ),
    ),
    Mutant(
        "call_is_lost_with_event_idx",
        "liveness: who wants a call is called",
        Edit(
            "ring/virtqueue_split.c",
            "vring_need_event(shared_load16(used_event(queue)), queue->shown_used, before);",
            "vring_need_event(shared_load16(used_event(queue)), queue->shown_used, queue->shown_used - 1);",
        ),
    ),
    Mutant(
        "fetched_chain_is_not_noted",
        "liveness over a death: what was in flight is served by the next life",
        Edit(
            "ring/inflight.h",
            "    shared_store_release8(&inflight->split->desc[head].inflight, 1);",
            "    (void)head;",
        ),
    ),
    Mutant(
        "used_index_comes_before_its_elements",
        "a driver believes what the index covers",
        Edit(
            "ring/virtqueue_split.c",
            "    queue->device->ring[queue->next_used & (queue->size - 1)] = (struct vring_used_elem){head, nbytes};",
            "    shared_store_release16(&queue->device->idx, queue->next_used + 1);\n"
            "    queue->device->ring[queue->next_used & (queue->size - 1)] = (struct vring_used_elem){head, nbytes};",
        ),
    ),
    Mutant(
        "batch_is_cleared_before_it_is_published",
        "a request is answered once, over a death",
        Edit(
            "ring/virtqueue_split.c",
            "    shared_store_release16(&queue->device->idx, queue->next_used);\n"
            "    queue->shown_used = queue->next_used;\n"
            "    inflight_split_published(&queue->inflight, queue->next_used);",
            "    inflight_split_published(&queue->inflight, queue->next_used);\n"
            "    shared_store_release16(&queue->device->idx, queue->next_used);\n"
            "    queue->shown_used = queue->next_used;",
        ),
    ),
    Mutant(
        "last_batch_is_served_again",
        "a request is answered once, over a death",
        Edit(
            "ring/inflight.c",
            "        shared_store_release8(&region->desc[head].inflight, 0);\n        head = shared",
            "        head = shared",
        ),
    ),
    Mutant(
        "locks_are_not_seen",
        "Law 3: nobody writes an entry beside its lock's holder",
        Edit("qcow2/plane/locks.c", "    if (!locks->count)\n        return 0;", "    if (locks)\n        return 0;"),
    ),
    Mutant(
        "claims_are_not_seen",
        "Law 3: a slice is not loaded while the file has not what waits",
        Edit(
            "qcow2/plane/translate.c",
            "    return map->claims[slice & (CLAIMS - 1)] || has_new_link(map, slice);",
            "    return 0;",
        ),
        ("overlay", "many-tables-overlay"),
    ),
    Mutant(
        "claims_of_the_engine_are_not_seen",
        "Law 3: what the engine has read a while ago undoes nothing that was linked since",
        Edit(
            "qcow2/plane/translate.c",
            "    return map->claims[slice & (CLAIMS - 1)] || has_new_link(map, slice);",
            "    return has_new_link(map, slice);",
        ),
        ("many-tables", "many-tables-overlay"),
    ),
    Mutant("links_of_the_data_plane_are_not_taken_over", "Law 2", sorts=("overlay", "overlay-lazy")),
    Mutant(
        "one_of_two_files_is_synced",
        "Law 2",
        Edit("virtio/block.c", "    if (request->synced != SYNCED || ", "    if (request->synced == SYNCED || "),
        ("data-file", "data-file-overlay"),
    ),
    Mutant(
        "what_was_written_once_is_taken_for_zeros",
        "Law 3: in a data file a place is zeros only if it was a hole",
        Edit(
            "qcow2/plane/fresh.c",
            "(map->format.is_identity && !untouched_has(map->untouched, touched->cluster, touched->cluster));",
            "(!map && !untouched_has(map->untouched, touched->cluster, touched->cluster));",
        ),
        ("data-file", "data-file-overlay"),
    ),
    Mutant(
        "clusters_of_encrypted_images_are_not_blanked",
        "Law 3: what is around a fresh write decrypts to zeros",
        sorts=("encrypted", "encrypted-overlay"),
    ),
    Mutant(
        "data_plane_frees_without_a_sync",
        "Laws 4 and 5: what is freed after a sync has begun waits for the next",
        sorts=("512", "accurate"),
        walks=True,
    ),
    Mutant(
        "part_of_what_waited_will_do",
        "Law 1: records that later ones have overwritten are missed",
        sorts=("overlay", "overlay-lazy"),
        walks=True,
    ),
    Mutant(
        "cluster_is_handed_out_twice",
        "Law 3",
        Edit("qcow2/plane/stock.c", "    run->first += count;", "    run->first += count - (run->first % 16 == 5);"),
    ),
    Mutant(
        "unsynced_clusters_are_linked",
        "Law 4 and 6: what is handed out is counted, stably",
        Edit(
            "qcow2/plane/fresh.c",
            "           take_cluster(map, waits ? map->unsynced : map->stock, host_cluster);",
            "           take_cluster(map, waits || map ? map->unsynced : map->stock, host_cluster);",
        ),
    ),
    Mutant(
        "copies_are_named_without_a_sync",
        "Law 3: the data is stable before its link",
        Edit(
            "virtio/place.c", "flight->place.after_sync && !flight->is_synced", "flight->place.after_sync && !request"
        ),
        ("overlay", "overlay-lazy"),
    ),
    Mutant(
        "old_content_is_left_out",
        "Law 3: a copy keeps what is around",
        Edit("qcow2/plane/fresh.c", "DATA && nbytes < old->nbytes) {", "DATA && nbytes > old->nbytes) {"),
        ("overlay", "overlay-lazy"),
    ),
    Mutant(
        "old_content_comes_from_the_start",
        "Law 3",
        Edit("qcow2/plane/fresh.c", "        place->old_offset = old->host_offset;", "        place->old_offset = 0;"),
        ("64k-backing-lazy",),
    ),
    Mutant(
        "cleared_slice_keeps_waiting_links",
        "Law 3: entries that wait are not cleared",
        Edit("qcow2/plane/clear.c", "!l2map_is_claimed(map, slice) && ", ""),
        ("overlay", "overlay-lazy"),
    ),
    Mutant(
        "freed_cluster_stays_mapped",
        "Law 5: an entry goes before its cluster",
        Edit(
            "qcow2/plane/clear.c",
            "    result = writer->write(writer, map->slot, host_offset, in_file,",
            "    result = writer ? 0 : writer->write(writer, map->slot, host_offset, in_file,",
        ),
    ),
    Mutant(
        "partial_clusters_are_zeroed",
        "Law 3: a discard covers whole clusters",
        Edit(
            "qcow2/plane/clear.c",
            "        *end &= ~in_unit;",
            "        *end = (*end + in_unit) & ~in_unit;",
        ),
    ),
    Mutant(
        "shared_clusters_are_written_in_place",
        "Law 3: a snapshot's cluster is copied first",
        Edit("qcow2/plane/translate.c", "(!is_write || (map->writable && run.copied))", "(!is_write || map->writable)"),
        ("snapshot", "snapshot-lazy"),
    ),
    Mutant(
        "drain_leaves_requests",
        "a stop ends with every request answered",
        Edit(
            "ring/queue.c",
            "if (!queue->draining || queue->in_flight || queue->dirty",
            "if (!queue->draining || queue->dirty",
        ),
    ),
    Mutant(
        "failed_sync_is_forgotten",
        "Law 7",
        Edit("ring/commit.c", "    file->error = -result;\n", ""),
    ),
    Mutant(
        "failed_write_succeeds",
        "Law 7",
        Edit(
            "ring/transfer.c",
            "    } else if (result < 0) {\n        end(worker, number, result);",
            "    } else if (result < 0) {\n        end(worker, number, operation->verb == VERB_WRITE ? 0 : result);",
        ),
    ),
    Mutant(
        "answers_of_others_wait_for_the_first_queue",
        "liveness: every queue gets its share",
        Edit(
            "ring/queue.c",
            "    while (worker->dirty_count) {\n",
            "    while (worker->dirty_count &&\n"
            "           (!worker->requests_in_flight || worker->dirty[worker->dirty_count - 1]->index == 0)) {\n",
        ),
    ),
    Mutant(
        "other_queues_wait_while_the_first_works",
        "liveness: every queue gets its share",
        Edit(
            "ring/queue.c",
            "        fetch(worker, queue);\n        is_crowded",
            "        if (!queue->index || !worker->queues[0].in_flight)\n"
            "            fetch(worker, queue);\n        is_crowded",
        ),
    ),
    Mutant(
        "a_polled_ring_is_forgotten_for_seconds",
        "liveness: an answer comes soon",
        Edit("ring/worker.c", "POLL_MILLISECONDS 1 ", "POLL_MILLISECONDS 5000 "),
    ),
    Mutant(
        "a_lone_flush_waits_for_company",
        "liveness: an answer comes soon, without company",
        Edit(
            "ring/commit.c",
            "if (worker->files[slot].waiting.first && !worker->files[slot].syncing)",
            "if (worker->files[slot].waiting.first && !worker->files[slot].syncing &&\n"
            "            (worker->files[slot].waiting.first->next || worker->requests_in_flight < 2))",
        ),
    ),
    Mutant(
        "drain_does_not_end_with_the_last_answer",
        "liveness: a stop ends",
        Edit(
            "ring/queue.c",
            "        finish_disabling(worker, queue);\n        finish_drain(worker, queue);\n",
            "        finish_disabling(worker, queue);\n",
        ),
    ),
    Mutant(
        "o_direct_gets_any_memory",
        "cache=none: what O_DIRECT does not take goes through a buffer",
        Edit("ring/gather.c", "iov_base & (file->memory_align - 1)) ||", "iov_base & 0) ||"),
        is_direct=True,
    ),
    Mutant(
        "a_far_name_is_written_at_once",
        "liveness: storage that may hang is not entered from the worker's thread",
        Edit("virtio/place.c", "if (!place->after_sync && !names_at_once", "if (!place && !names_at_once"),
        ("data-file", "data-file-overlay"),
    ),
    # what was wrong once, in the history of these sources
    Mutant(
        "once_a_cancelled_sync_had_failed",
        "Law 7: a failure is one; until de9bafc",
        Edit(
            "ring/commit.c",
            "    if (result == -ECANCELED && !untried)\n        result = host_sync(file->fd);",
            "    if (result == -ECANCELED && !file)\n        result = host_sync(file->fd);",
        ),
    ),
    Mutant(
        "once_cancelled_work_had_failed",
        "Law 7: a failure is one; until de9bafc",
        Edit(
            "ring/transfer.c",
            "storage != STORAGE_FAR)\n        result = perform_here",
            "storage != STORAGE_FAR && !operation)\n        result = perform_here",
        ),
    ),
    Mutant(
        "once_cancelled_work_went_another_way",
        "cache=none: what O_DIRECT does not take goes through a buffer; until 474cfb0",
        Edit(
            "ring/transfer.c",
            "        result = gather_way(worker, operation, &single, &gather);\n        if",
            "        result = gather_next(worker, operation, &single, &gather);\n        if",
        ),
        is_direct=True,
    ),
    Mutant(
        "once_an_interrupted_sync_had_failed",
        "Law 7: a failure is one; until 946a400",
        Edit("ring/commit.c", "bool again = is_interrupted(file, result);", "bool again = false;"),
    ),
    Mutant(
        "once_the_maps_error_went_nowhere",
        "Law 7: a close after a lost entry or mark is no clean one; until 42cbc66",
        Edit("qcow2/plane/l2cache.c", "    map->error = -result;\n", ""),
    ),
    Mutant(
        "once_a_link_outlived_its_cluster", "Law 3; until 092c940", sorts=("overlay", "compressed-base"), is_full=True
    ),
    Mutant(
        "once_two_links_waited_for_each_other",
        "liveness: on a host that stays full a write fails soon; until a6876b3",
        sorts=("overlay", "compressed-base"),
        is_filled=True,
    ),
    Mutant(
        "once_a_link_without_a_record_was_seen",
        "Law 1: what is acknowledged stays; until debcaf15",
        sorts=("overlay", "compressed-base"),
        is_filled=True,
    ),
]
BY_NAME = {mutant.name: mutant for mutant in MUTANTS}
