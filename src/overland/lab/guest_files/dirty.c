/* Keeps dirtying MIB mebibytes of memory at RATE mebibytes per second: dirty MIB RATE */
#include <stdlib.h>
#include <time.h>
int main(int argc, char **argv) {
  if (argc < 3) return 2;
  size_t size = (size_t)atol(argv[1]) << 20, page = 4096, at = 0;
  long rate = atol(argv[2]);
  volatile char *memory = malloc(size);
  if (!memory || rate <= 0) return 1;
  struct timespec pause = {0, 10000000};
  for (;;) {
    for (long pages = rate * 256 / 100; pages > 0; pages--) {
      memory[at]++;
      at = at + page < size ? at + page : 0;
    }
    nanosleep(&pause, NULL);
  }
}
