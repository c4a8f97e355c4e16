/* The formats of a ring, between virtqueue.c and the file of each; virtqueue.h says what they do. */
#pragma once

#include "ring/virtqueue.h"

int split_relocate(struct virtqueue *queue, const struct virtqueue_layout *layout, const struct guest_memory *memory);
int split_begin(struct virtqueue *queue, const struct virtqueue_layout *layout);
int split_pop(struct virtqueue *queue, struct guest_memory *memory, struct chain *chain);
void split_push(struct virtqueue *queue, uint16_t head, uint32_t nbytes);
void split_show(struct virtqueue *queue);
int split_publish(struct virtqueue *queue);
int split_arm(struct virtqueue *queue);
void split_disarm(struct virtqueue *queue);

int packed_relocate(struct virtqueue *queue, const struct virtqueue_layout *layout, const struct guest_memory *memory);
int packed_begin(struct virtqueue *queue, const struct virtqueue_layout *layout);
int packed_pop(struct virtqueue *queue, struct guest_memory *memory, struct chain *chain);
void packed_push(struct virtqueue *queue, uint16_t id, uint32_t nbytes);
void packed_show(struct virtqueue *queue);
int packed_publish(struct virtqueue *queue);
int packed_arm(struct virtqueue *queue);
void packed_disarm(struct virtqueue *queue);
