/* A plugin of qemu-user that counts the guest's instructions, of all threads of a process, and tells the guest.
 *
 * A guest that makes the system call MARK, which no kernel has, with a file descriptor as its first argument finds the
 * count there, as eight bytes: descriptors are the same inside and outside of qemu-user. The count includes every
 * instruction of a block that was entered. PLUGIN_VERSION: of qemu's plugin interface, as the qemu at hand has it.
 */
#include <stddef.h>
#include <stdint.h>
#include <unistd.h>

/* The part of qemu's public plugin interface that is used (include/qemu/qemu-plugin.h). */
typedef uint64_t qemu_plugin_id_t;
typedef struct qemu_info_t qemu_info_t;
struct qemu_plugin_tb;
enum qemu_plugin_cb_flags { QEMU_PLUGIN_CB_NO_REGS };
void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t, void (*)(qemu_plugin_id_t, struct qemu_plugin_tb*));
void qemu_plugin_register_vcpu_tb_exec_cb(struct qemu_plugin_tb*, void (*)(unsigned, void*), enum qemu_plugin_cb_flags, void*);
void qemu_plugin_register_vcpu_syscall_cb(qemu_plugin_id_t, void (*)(qemu_plugin_id_t, unsigned, int64_t, uint64_t,
                                          uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t));
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb*);

__attribute__((visibility("default"))) int qemu_plugin_version = PLUGIN_VERSION;

enum { MARK = 0x7471 }; /* "tq"; the same in board_count.h */
static uint64_t executed;

static void run(unsigned processor, void* count) {
  (void)processor;
  __atomic_fetch_add(&executed, (uintptr_t)count, __ATOMIC_RELAXED);
}

static void translate(qemu_plugin_id_t id, struct qemu_plugin_tb* block) {
  (void)id;
  void* count = (void*)(uintptr_t)qemu_plugin_tb_n_insns(block);
  qemu_plugin_register_vcpu_tb_exec_cb(block, run, QEMU_PLUGIN_CB_NO_REGS, count);
}

static void system_call(qemu_plugin_id_t id, unsigned processor, int64_t number, uint64_t descriptor, uint64_t b,
                        uint64_t c, uint64_t d, uint64_t e, uint64_t f, uint64_t g, uint64_t h) {
  (void)id, (void)processor, (void)b, (void)c, (void)d, (void)e, (void)f, (void)g, (void)h;
  if (number != MARK) return;
  uint64_t now = __atomic_load_n(&executed, __ATOMIC_RELAXED);
  if (write((int)descriptor, &now, sizeof now) != sizeof now) return; /* the guest misses it */
}

__attribute__((visibility("default"))) int qemu_plugin_install(qemu_plugin_id_t id, const qemu_info_t* info, int argc,
                                                               char** argv) {
  (void)info, (void)argc, (void)argv;
  qemu_plugin_register_vcpu_tb_trans_cb(id, translate);
  qemu_plugin_register_vcpu_syscall_cb(id, system_call);
  return 0;
}
