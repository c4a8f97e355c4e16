/* The ring fuzzer without a fuzzer: gives it every input of a corpus file, one a line in hexadecimal. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define NBYTES_MAX 16384

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t nbytes);
size_t LLVMFuzzerMutate(uint8_t *data, size_t nbytes, size_t room);

/* Of libFuzzer's; nothing is mutated here. */
size_t LLVMFuzzerMutate(uint8_t *data, size_t nbytes, size_t room)
{
    return nbytes < room ? nbytes : room;
}

static int digit(char character)
{
    return character <= '9' ? character - '0' : character - 'a' + 10;
}

static size_t parse(const char *line, uint8_t *data)
{
    size_t nbytes = 0;

    for (; line[0] > ' ' && line[1] > ' ' && nbytes < NBYTES_MAX; line += 2)
        data[nbytes++] = (uint8_t)(digit(line[0]) << 4 | digit(line[1]));
    return nbytes;
}

int main(int argc, char **argv)
{
    static char line[2 * NBYTES_MAX + 2];
    static uint8_t data[NBYTES_MAX];
    FILE *corpus = argc == 2 ? fopen(argv[1], "r") : NULL;
    int count = 0;

    if (!corpus) {
        fprintf(stderr, "usage: %s CORPUS.hex\n", argv[0]);
        return 2;
    }
    for (; fgets(line, sizeof(line), corpus); count++)
        LLVMFuzzerTestOneInput(data, parse(line, data));
    fclose(corpus);
    printf("%d inputs\n", count);
    return count ? 0 : 1;
}
