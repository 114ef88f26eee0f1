// Positions of an OpenMM Context as its platform holds them, copied without a detour: the helper behind native.py.
//
// CUDA: OpenMM has a CUDA context of its own, torch the device's primary one; both are of one process, so that
// cuMemcpyPeer copies between them on the device. With REGFLOW_OPENCL the same code serves OpenCL by way of the host:
// there the order of atoms, padding, precision and corrections can be tested without an NVIDIA GPU.
//
// Every function returns 0, or 1 with the reason in regflow_error().

#include <dlfcn.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "openmm/Context.h"
#include "openmm/Integrator.h"
#include "openmm/Platform.h"
#include "openmm/common/ContextSelector.h"
#include "openmm/internal/ContextImpl.h"
#ifdef REGFLOW_OPENCL
#include "OpenCLContext.h"
typedef OpenMM::OpenCLPlatform ThePlatform;
typedef OpenMM::OpenCLContext TheContext;
static const char* const NAME = "OpenCL";
#else
#include "CudaContext.h"
typedef OpenMM::CudaPlatform ThePlatform;
typedef OpenMM::CudaContext TheContext;
static const char* const NAME = "CUDA";
#endif

using namespace OpenMM;

namespace {

thread_local std::string lastError;

// Platforms may see the inside of a Context, and this is one.
class Key : public Platform {
public:
    const std::string& getName() const {
        static const std::string name = "key";
        return name;
    }
    double getSpeed() const {
        return 0;
    }
    bool supportsDoublePrecision() const {
        return false;
    }
    ContextImpl& open(void* context) const {
        return getContextImpl(*static_cast<Context*>(context));
    }
};

// What ContextImpl::setPositions ends with: integrators that keep forces (NoseHoover, Custom) forget those of the old
// positions. ContextImpl::systemChanged speaks of the energy alone, which NoseHoover takes no notice of. Only friends of
// an Integrator and its subclasses may call it.
class Notice : public Integrator {
public:
    static void positionsChanged(Integrator& integrator) {
        (integrator.*&Notice::stateChanged)(State::Positions);
    }
};

ContextImpl& inside(void* context) {
    static const Key key;
    return key.open(context);
}

TheContext& deviceOf(void* context) {
    ContextImpl& impl = inside(context);
    if (impl.getPlatform().getName() != NAME)
        throw std::runtime_error("the Context is on the platform " + impl.getPlatform().getName());
    ThePlatform::PlatformData* data = static_cast<ThePlatform::PlatformData*>(impl.getPlatformData());
    if (data->contexts.size() != 1)
        throw std::runtime_error("the Context is spread over several devices");
    return *data->contexts[0];
}

#ifdef REGFLOW_OPENCL

void copyOut(TheContext& device, ArrayInterface& array, void* target) {
    array.download(target);
}

void copyIn(TheContext& device, ArrayInterface& array, const void* source) {
    array.upload(source);
}

#else

// The driver is loaded already; looking its functions up spares the linker a library that build machines lack.
template <class Function>
Function driver(const char* name) {
    void* library = dlopen("libcuda.so.1", RTLD_NOW);
    void* found = library == nullptr ? nullptr : dlsym(library, name);
    if (found == nullptr)
        throw std::runtime_error(std::string("the CUDA driver has no ") + name);
    return reinterpret_cast<Function>(found);
}

void check(CUresult result, const char* what) {
    if (result != CUDA_SUCCESS)
        throw std::runtime_error(std::string(what) + " failed with CUDA error " + std::to_string(result));
}

// The device's primary context, which torch uses, for as long as a copy takes.
class Primary {
public:
    explicit Primary(CUdevice device) : device(device) {
        check(driver<CUresult (*)(CUcontext*, CUdevice)>("cuDevicePrimaryCtxRetain")(&context, device), "retaining");
    }
    ~Primary() {
        driver<CUresult (*)(CUdevice)>("cuDevicePrimaryCtxRelease_v2")(device);
    }
    CUcontext context;

private:
    CUdevice device;
};

void copy(CUdeviceptr target, CUcontext to, CUdeviceptr source, CUcontext from, size_t bytes) {
    static auto peer = driver<CUresult (*)(CUdeviceptr, CUcontext, CUdeviceptr, CUcontext, size_t)>("cuMemcpyPeer");
    static auto synchronise = driver<CUresult (*)()>("cuCtxSynchronize");
    check(synchronise(), "waiting before the copy");
    check(peer(target, to, source, from, bytes), "the copy");
    check(synchronise(), "waiting after the copy");
}

size_t bytesOf(ArrayInterface& array) {
    return array.getSize() * array.getElementSize();
}

void copyOut(TheContext& device, CudaArray& array, void* target) {
    Primary torch(device.getDevice());
    copy((CUdeviceptr) target, torch.context, array.getDevicePointer(), device.getContext(), bytesOf(array));
}

void copyIn(TheContext& device, CudaArray& array, const void* source) {
    Primary torch(device.getDevice());
    copy(array.getDevicePointer(), device.getContext(), (CUdeviceptr) source, torch.context, bytesOf(array));
}

#endif

template <class Work>
int guarded(Work work) {
    try {
        work();
        return 0;
    } catch (const std::exception& error) {
        lastError = error.what();
        return 1;
    }
}

}  // namespace

extern "C" {

const char* regflow_error() {
    return lastError.c_str();
}

// numbers: atoms, padded atoms, bytes of a number in posq, 1 if there are corrections, device index.
int regflow_describe(void* context, int* numbers) {
    return guarded([&] {
        TheContext& device = deviceOf(context);
        numbers[0] = device.getNumAtoms();
        numbers[1] = device.getPaddedNumAtoms();
        numbers[2] = device.getUseDoublePrecision() ? 8 : 4;
        numbers[3] = device.getUseMixedPrecision() ? 1 : 0;
        numbers[4] = device.getDeviceIndex();
    });
}

// order (atoms): the atom in each slot. cells (3 per atom): boxes by which a slot was moved. box: nine numbers [nm].
int regflow_layout(void* context, int* order, int* cells, double* box) {
    return guarded([&] {
        TheContext& device = deviceOf(context);
        const std::vector<int>& index = device.getAtomIndex();
        const std::vector<mm_int4>& offsets = device.getPosCellOffsets();
        for (int i = 0; i < device.getNumAtoms(); i++) {
            order[i] = index[i];
            cells[3 * i] = offsets[i].x;
            cells[3 * i + 1] = offsets[i].y;
            cells[3 * i + 2] = offsets[i].z;
        }
        Vec3 vectors[3];
        device.getPeriodicBoxVectors(vectors[0], vectors[1], vectors[2]);
        for (int i = 0; i < 9; i++)
            box[i] = vectors[i / 3][i % 3];
    });
}

// posq: 4 numbers for every padded atom; correction: likewise in single precision, or null.
int regflow_read(void* context, void* posq, void* correction) {
    return guarded([&] {
        TheContext& device = deviceOf(context);
        ContextSelector selector(device);
        copyOut(device, device.getPosq(), posq);
        if (correction != nullptr)
            copyOut(device, device.getPosqCorrection(), correction);
    });
}

// The inverse of regflow_read, in the order of regflow_layout; no slot is moved by boxes afterwards.
int regflow_write(void* context, const void* posq, const void* correction) {
    return guarded([&] {
        TheContext& device = deviceOf(context);
        ContextSelector selector(device);
        copyIn(device, device.getPosq(), posq);
        if (correction != nullptr)
            copyIn(device, device.getPosqCorrection(), correction);
        std::vector<mm_int4> none(device.getPosCellOffsets().size(), mm_int4(0, 0, 0, 0));
        device.setPosCellOffsets(none);
        device.reorderAtoms();
        Notice::positionsChanged(inside(context).getIntegrator());
    });
}
}
