// A kernel's name from its address. Kernels have hidden or internal linkage, so the dynamic symbols
// do not know them; the symbol table of the file does, unless it was stripped.
#include <cxxabi.h>
#if defined(__linux__)
#include <elf.h>
#include <link.h>
#endif
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <unordered_map>
#include <vector>

#include "state.h"

namespace emulator {
namespace {

#if defined(__linux__) && __SIZEOF_POINTER__ == 8
// Address within the file's image to mangled name, for every function of the file.
std::unordered_map<uintptr_t, std::string> read_symbols(const char* path) {
  std::unordered_map<uintptr_t, std::string> names;
  std::ifstream file(path, std::ios::binary);
  const auto read = [&](uint64_t offset, void* to, size_t bytes) {
    file.seekg(static_cast<std::streamoff>(offset));
    file.read(static_cast<char*>(to), static_cast<std::streamsize>(bytes));
    return static_cast<bool>(file);
  };
  Elf64_Ehdr header;
  if (!read(0, &header, sizeof(header)) || memcmp(header.e_ident, ELFMAG, SELFMAG) != 0)
    return names;
  std::vector<Elf64_Shdr> sections(header.e_shnum);
  if (!read(header.e_shoff, sections.data(), sections.size() * sizeof(Elf64_Shdr))) return names;
  for (const Elf64_Shdr& section : sections) {
    if (section.sh_type != SHT_SYMTAB || section.sh_link >= sections.size()) continue;
    const Elf64_Shdr& strings = sections[section.sh_link];
    std::vector<char> text(strings.sh_size + 1);
    std::vector<Elf64_Sym> symbols(section.sh_size / sizeof(Elf64_Sym));
    if (!read(strings.sh_offset, text.data(), strings.sh_size)) return names;
    if (!read(section.sh_offset, symbols.data(), symbols.size() * sizeof(Elf64_Sym))) return names;
    for (const Elf64_Sym& symbol : symbols) {
      if (ELF64_ST_TYPE(symbol.st_info) == STT_FUNC && symbol.st_name < strings.sh_size) {
        names[symbol.st_value] = text.data() + symbol.st_name;
      }
    }
  }
  return names;
}
#endif

// Without the parameters, and without the words that every kernel's name would carry.
std::string shorten(std::string name) {
  for (const std::string word : {"(anonymous namespace)::"}) {
    for (size_t i; (i = name.find(word)) != std::string::npos;) name.erase(i, word.size());
  }
  // The parameters open at the first parenthesis outside template arguments.
  int depth = 0;
  for (size_t i = 0; i < name.size(); ++i) {
    depth += (name[i] == '<') - (name[i] == '>');
    if (name[i] == '(' && depth == 0) {
      name.erase(i);
      break;
    }
  }
  // A template's name begins with its return type.
  return name.rfind("void ", 0) == 0 ? name.substr(5) : name;
}

}  // namespace

std::string function_name(const void* function) {
  static std::unordered_map<const void*, std::string> known;
  const auto found = known.find(function);
  if (found != known.end()) return found->second;
  std::string name;
  Dl_info info;
  if (dladdr(function, &info) != 0) {
#if defined(__linux__) && __SIZEOF_POINTER__ == 8
    static const auto symbols = read_symbols(info.dli_fname);
    // Symbols of a position-independent file count from its base.
    const auto base = reinterpret_cast<uintptr_t>(info.dli_fbase);
    const auto address = reinterpret_cast<uintptr_t>(function);
    auto symbol = symbols.find(address - base);
    if (symbol == symbols.end()) symbol = symbols.find(address);
    if (symbol != symbols.end()) name = symbol->second;
#endif
    if (name.empty() && info.dli_saddr == function && info.dli_sname != nullptr) {
      name = info.dli_sname;
    }
    int status = 0;
    char* const demangled = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status);
    if (status == 0 && demangled != nullptr) name = shorten(demangled);
    std::free(demangled);
  }
  return known[function] = name;
}

}  // namespace emulator
